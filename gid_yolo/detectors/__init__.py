"""Detection networks on timm backbones: plain PyTorch, heads only convolve."""

from gid_yolo.detectors.build import build_detector, model_config
from gid_yolo.detectors.retinanet import RetinaNet

__all__ = ["RetinaNet", "build_detector", "model_config"]
