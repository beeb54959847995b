"""Data sets: the synthetic default set, and the conversion of VOC and COCO annotations to Ultralytics' layout."""

from gid_yolo.data.cache import cache_dir
from gid_yolo.data.convert import prepare_data
from gid_yolo.data.synthetic import synthetic_dataset

__all__ = ["cache_dir", "prepare_data", "synthetic_dataset"]
