"""Detection networks on timm backbones: plain PyTorch, heads only convolve."""

from gid_yolo.detectors.build import build_detector, model_config
from gid_yolo.detectors.detector import Detector
from gid_yolo.detectors.faster_rcnn import FasterRCNN
from gid_yolo.detectors.fcos import FCOS
from gid_yolo.detectors.retinanet import RetinaNet

__all__ = ["FCOS", "Detector", "FasterRCNN", "RetinaNet", "build_detector", "model_config"]
