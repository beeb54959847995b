"""Ultralytics' prediction, which says at its end which images it could not read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ultralytics.models.yolo.detect import DetectionPredictor
from ultralytics.utils import DEFAULT_CFG, LOGGER

from gid_yolo.engine.config import ultralytics_args


class GIDPredictor(DetectionPredictor):
    """Predicts with NMS outside the network.

    Attributes:
        unreadable: Files of the last source that could not be decoded; they have no result.
    """

    def __init__(self, cfg: Any = DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: Any = None) -> None:
        super().__init__(cfg, ultralytics_args(overrides or {}), _callbacks)
        self.unreadable: list[str] = []

    def setup_source(self, source: Any, *args: Any, **kwargs: Any) -> None:
        """Open the source and listen for images that fail to decode."""
        super().setup_source(source, *args, **kwargs)
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
        yield from super().stream_inference(*args, **kwargs)
        if self.unreadable:
            LOGGER.warning(f"{len(self.unreadable)} image(s) could not be read and were skipped: {self.unreadable}")
