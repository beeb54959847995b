"""Ultralytics' prediction, which says at its end which images it could not read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ultralytics.models.yolo.detect import DetectionPredictor
from ultralytics.utils import DEFAULT_CFG, LOGGER

from gid_yolo.engine.config import ultralytics_args
from gid_yolo.engine.detection_model import limited
from gid_yolo.errors import UserError, some


class GIDPredictor(DetectionPredictor):
    """Predicts; a network that holds the NMS goes by the arguments' limits.

    Attributes:
        unreadable: Files of the last source that could not be decoded; they have no result.
    """

    def __init__(self, cfg: Any = DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: Any = None) -> None:
        super().__init__(cfg, ultralytics_args(overrides or {}), _callbacks)
        self.unreadable: list[str] = []
        self.limits = contextlib.ExitStack()
        self.source: Any = None

    def setup_source(self, source: Any, *args: Any, **kwargs: Any) -> None:
        """Open the source and listen for images that fail to decode.

        Raises:
            UserError: It is none or not there, no camera or stream answers, or what would read it is not installed.
        """
        self.source = source
        try:
            super().setup_source(source, *args, **kwargs)
        except (OSError, ImportError, TypeError) as error:
            raise _unread(source, error) from error
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
        """Yield results, then count the images that were skipped.

        Raises:
            UserError: A later file of the source is no video, or nothing of the source could be read.
        """
        results = 0
        try:
            with self.limits:
                for result in super().stream_inference(*args, **kwargs):
                    results += 1
                    yield result
        except FileNotFoundError as error:
            if error.errno is not None:  # the system's, of a place to write to; Ultralytics' own have none
                raise
            raise _unread(self.source, error) from error
        if self.unreadable and not results:
            raise UserError(
                f"source={self.source} cannot be read: no image could be decoded ({some(self.unreadable)})."
            )
        if self.unreadable:
            LOGGER.warning(f"{len(self.unreadable)} image(s) could not be read and were skipped: {self.unreadable}")


def _unread(source: Any, error: Exception) -> UserError:
    return UserError(f"source={source} cannot be read: {' '.join(str(error).split())[:300]}")
