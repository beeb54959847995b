"""Settings of Ultralytics' YOLO models by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ultralytics.nn.tasks import yaml_model_load

from gid_yolo.cfg import model_names
from gid_yolo.engine.yolo_view import YOLO_HEADS
from gid_yolo.errors import UserError


def yolo_config(cfg: str) -> dict[str, Any] | None:
    """Settings of an Ultralytics model yaml, a file or one that it ships; None for everything else.

    Raises:
        UserError: A yaml of Ultralytics that is no YOLO detector.
    """
    if Path(cfg).stem in model_names():
        return None
    try:
        config = yaml_model_load(cfg)
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict) or "head" not in config or "detector" in config:
        return None
    if (head := config["head"][-1][2]) not in {kind.__name__ for kind in YOLO_HEADS}:
        raise UserError(f"model={cfg} ends in a {head} head: give the yaml of a YOLO detector, e.g. yolo11n.yaml.")
    return config
