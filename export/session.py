"""Detectors from ONNX files with onnxruntime, numpy and OpenCV alone: neither torch nor Ultralytics is imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gid_yolo.errors import UserError
from gid_yolo.export.metadata import FileInfo, check_limits, chosen_size, read_info
from gid_yolo.export.postprocess import from_dense, from_final, scale_boxes
from gid_yolo.export.preprocess import Fit, fit, letterbox, read_image, to_input
from gid_yolo.export.providers import first_line, open_session, run, start
from gid_yolo.scalars import as_python

__all__ = ["Detections", "OnnxDetector", "open_session", "run"]

Image = str | Path | np.ndarray


@dataclass(frozen=True, eq=False)
class Detections:
    """What was found in one image, by falling score.

    Attributes:
        boxes: (N, 4) float32, x1, y1, x2, y2 in pixels of the image as it was given.
        scores: (N,) float32 in [0, 1].
        classes: (N,) int64.
        names: Class names by number.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    names: Mapping[int, str]

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def labels(self) -> list[str]:
        """The class name of each detection."""
        return [self.names.get(int(number), str(number)) for number in self.classes]


class OnnxDetector:
    """A detector's ONNX file, ready to run: `OnnxDetector("student.onnx")(["a.jpg", "b.jpg"])`.

    Takes the files of `gid-export` and those that `yolo export format=onnx` writes of detectors, with and without NMS
    inside, and gives what `yolo predict` gives for them.

    Args:
        path: The file.
        provider: `cpu`, `cuda`, `cuda:1`, `tensorrt`, `openvino`, ...: see `providers.start`. By default the best that
            starts; what really runs is in the attribute `provider`.
        threads: Threads on the CPU, one a core at most; by default one a core.
        conf: Score over which a box is a detection. A file with NMS inside has besides the one it was exported with.
        iou: Threshold of the NMS outside the file; by default what the file says it is evaluated with (RetinaNet 0.5,
            FCOS 0.6), and Ultralytics' 0.7 where it does not.
        max_det: Detections of an image at most.
        imgsz: Side, or height and width, of the letterbox, for a file that leaves them open; by default the file's.
        batch: Images in a run, for a file that leaves that open; by default what it was exported with.
        rect: A file that leaves height and width open gets each image with as little padding as possible, as from
            `yolo predict`; False always pads to `imgsz`.

    Attributes:
        provider: onnxruntime's name of the provider that runs, such as `CUDAExecutionProvider`.
        info: What the file says of itself.
        session: onnxruntime's session.

    Raises:
        UserError: A file, provider or argument that cannot be used.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        provider: str | None = None,
        threads: int | None = None,
        conf: float = 0.25,
        iou: float | None = None,
        max_det: int = 300,
        imgsz: int | Sequence[int] | None = None,
        batch: int | None = None,
        rect: bool = True,
    ) -> None:
        conf, iou, max_det, imgsz, batch = map(as_python, (conf, iou, max_det, imgsz, batch))
        check_limits(
            {"conf": conf, "iou": 0 if iou is None else iou},
            {"max_det": max_det, "batch": 1 if batch is None else batch},
        )
        self.path = Path(path)
        self.session = start(path, provider, threads)
        self.provider: str = self.session.get_providers()[0]
        self.info: FileInfo = read_info(self.session, path)
        self.names = self.info.names
        self.conf, self.iou, self.max_det = conf, self.info.limits["iou"] if iou is None else iou, max_det
        self.size = chosen_size(self.info, imgsz, path)
        self.batch = self._batch(batch)
        self._stride = self.info.stride if rect and not self.info.fixed_size else None

    def __repr__(self) -> str:
        size = f"{self.size[0]}x{self.size[1]}" + ("" if self.info.fixed_size else " or any other")
        return f"OnnxDetector({self.path.name}: {len(self.names)} classes, {size}, runs on {self.provider})"

    def __call__(self, images: Image | Iterable[Image], *, rgb: bool = False) -> list[Detections]:
        """Detect.

        Images are read and run `batch` at a time, each letterboxed for itself: what is found in one does not depend on
        the others.

        Args:
            images: Path or array, or several: uint8 (H, W, 3) BGR as `cv2.imread` gives it, (H, W), or (H, W, 4).
            rgb: Arrays are RGB instead.

        Returns:
            The detections of each image, in the order given.

        Raises:
            UserError: What is not an image.
        """
        several = isinstance(images, Iterable) and not isinstance(images, str | np.ndarray)
        items: list[Any] = list(images) if several else [images]  # type: ignore[arg-type]
        found: list[Detections] = []
        for first in range(0, len(items), self.batch):
            found += self._detect([read_image(item, rgb=rgb) for item in items[first : first + self.batch]])
        return found

    def _detect(self, images: list[np.ndarray]) -> list[Detections]:
        groups: dict[tuple[int, int], list[int]] = {}  # by the size of the letterbox: a run takes one
        for i, image in enumerate(images):
            groups.setdefault(self._fit(image).size, []).append(i)
        found: dict[int, Detections] = {}
        for size, members in groups.items():
            output = self.run(self.prepare([images[i] for i in members]))
            found |= zip(members, self.finish(output, size, [images[i].shape for i in members]), strict=True)
        return [found[i] for i in range(len(images))]

    def prepare(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """The network's input for images as `read_image` gives them.

        Returns:
            (B, 3, H, W) RGB in [0, 1], of the input's type. Images whose letterboxes differ are all padded to `size`.
        """
        places = [self._fit(image) for image in images]
        if len({place.size for place in places}) > 1:
            places = [fit(image.shape, self.size) for image in images]
        return to_input([letterbox(*pair) for pair in zip(images, places, strict=True)], self.info.dtype)

    def run(self, batch: np.ndarray) -> np.ndarray:
        """The network's output for (B, 3, H, W) RGB in [0, 1]; a file of a fixed batch gets parts, the last filled up.

        Returns:
            (B, 4 + C, R) or (B, N, 6), see `FileInfo.final`.

        Raises:
            UserError: Another shape than the file takes, or onnxruntime fails.
        """
        wanted = batch.shape[2:] if batch.ndim == 4 and not self.info.fixed_size else self.size
        if batch.shape[1:] != (3, *wanted) or not len(batch):
            raise UserError(f"the input must be (batch, 3, {wanted[0]}, {wanted[1]}), not {batch.shape}.")
        batch = batch.astype(self.info.dtype, copy=False)
        most = self.info.most or len(batch)
        outputs = []
        for first in range(0, len(batch), most):
            part = batch[first : first + most]
            count = len(part)
            if self.info.fixed_batch and count < most:
                part = np.concatenate([part, np.zeros((most - count, *part.shape[1:]), part.dtype)])
            try:
                outputs.append(run(self.session, part)[:count])
            except Exception as error:  # onnxruntime's exceptions have no common base below Exception
                raise UserError(f"{self.path} fails on {part.shape}: {first_line(error)}") from error
        return outputs[0] if len(outputs) == 1 else np.concatenate(outputs)

    def finish(self, output: np.ndarray, size: Sequence[int], shapes: Sequence[Sequence[int]]) -> list[Detections]:
        """Detections in pixels of the images out of the network's output.

        Args:
            output: What `run` gave.
            size: Height and width of the network's input.
            shapes: Height and width of each image.

        Raises:
            UserError: Scores are NaN, or a detection is not finite.
        """
        found = []
        for rows, shape in zip(output, shapes, strict=True):
            try:
                if self.info.final:
                    rows = from_final(rows, conf=self.conf, max_det=self.max_det)
                else:
                    rows = from_dense(rows, conf=self.conf, iou=self.iou, max_det=self.max_det)
            except FloatingPointError as error:
                raise UserError(
                    f"{self.path} gives {error}: its weights or its precision are broken, export it again."
                ) from error
            boxes = scale_boxes(rows[:, :4], size, shape[:2])
            found.append(Detections(boxes, rows[:, 4], rows[:, 5].astype(np.int64), self.names))
        return found

    def _fit(self, image: np.ndarray) -> Fit:
        return fit(image.shape, self.size, self._stride)

    def _batch(self, batch: int | None) -> int:
        batch = self.info.batch if batch is None else batch
        if batch != self.info.batch and (self.info.fixed_batch or batch > (self.info.most or batch)):
            kind = "no other number of" if self.info.fixed_batch else "no more"
            raise UserError(f"batch={batch}: {self.path} takes {self.info.batch} and {kind} images in a run.")
        return batch
