"""Ultralytics' prediction; our detectors need nothing of their own."""

from __future__ import annotations

from typing import Any

from ultralytics.models.yolo.detect import DetectionPredictor

from gid_yolo.engine.config import ultralytics_args


class GIDPredictor(DetectionPredictor):
    """Predicts with NMS outside the network."""

    def __init__(self, cfg: Any = None, overrides: dict[str, Any] | None = None, _callbacks: Any = None) -> None:
        from ultralytics.utils import DEFAULT_CFG

        super().__init__(cfg or DEFAULT_CFG, ultralytics_args(overrides or {}), _callbacks)
