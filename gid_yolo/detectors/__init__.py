"""Detection networks on timm backbones: plain PyTorch, heads only convolve."""

from gid_yolo.detectors.build import build_detector, model_config
from gid_yolo.detectors.detector import Detector
from gid_yolo.detectors.retinanet import RetinaNet

__all__ = ["Detector", "RetinaNet", "build_detector", "model_config"]
