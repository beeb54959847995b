"""Ultralytics' prediction, which says at its end which images it could not read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ultralytics.models.yolo.detect import DetectionPredictor
from ultralytics.utils import DEFAULT_CFG, LOGGER

from gid_yolo.engine.config import ultralytics_args
from gid_yolo.engine.detection_model import limited


class GIDPredictor(DetectionPredictor):
    """Predicts; a network that holds the NMS goes by the arguments' limits.

    Attributes:
        unreadable: Files of the last source that could not be decoded; they have no result.
    """

    def __init__(self, cfg: Any = DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: Any = None) -> None:
        super().__init__(cfg, ultralytics_args(overrides or {}), _callbacks)
        self.unreadable: list[str] = []
        self.limits = contextlib.ExitStack()

    def setup_source(self, source: Any, *args: Any, **kwargs: Any) -> None:
        """Open the source and listen for images that fail to decode."""
        super().setup_source(source, *args, **kwargs)
        if self.model.format == "pt":
            most = max(self.args.max_det, 300)  # Ultralytics': `classes=` chooses among them, the best max_det are left
            self.limits.enter_context(limited(self.model.model, conf=self.args.conf, iou=self.args.iou, max_det=most))
        self.unreadable = []
        append = getattr(self.dataset, "_append_image", None)
        if append is None:  # a stream, or images already in memory
            return

        def listen(paths: list, images: list, info: list, path: str, image: Any, index: int) -> None:
            if image is None:
                self.unreadable.append(path)
            append(paths, images, info, path, image, index)

        self.dataset._append_image = listen

    def stream_inference(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Yield results, then count the images that were skipped."""
        with self.limits:
            yield from super().stream_inference(*args, **kwargs)
        if self.unreadable:
            LOGGER.warning(f"{len(self.unreadable)} image(s) could not be read and were skipped: {self.unreadable}")
