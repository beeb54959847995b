"""The paper's ten columns from pycocotools, for any data set."""

from __future__ import annotations

import contextlib
import ctypes
import io
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from ultralytics.utils import LOGGER

from gid_yolo.engine.matches import Matches, collected

COLUMNS = ("mAP", "AP50", "AP75", "AP_S", "AP_M", "AP_L", "mAR", "AR_S", "AR_M", "AR_L")
# Where COCOeval.summarize() puts them in its `stats`; mAR is AR at 100 detections an image
_STATS = dict(zip(COLUMNS, (0, 1, 2, 3, 4, 5, 8, 9, 10, 11), strict=True))
CHUNK = 100  # images that a process of its own evaluates while the next ones are predicted
_ALL = 10**9  # detections

Image = tuple[np.ndarray, ...]  # as `CocoAccumulator.add` takes it
Evaluated = list[dict[str, np.ndarray] | None]  # by class and range of area


class CocoAccumulator:
    """Collects ground truth and detections image by image, and evaluates them.

    Areas of objects are those of their boxes (labels carry no masks), in pixels of the original image; small, medium
    and large are COCO's, divided at 32 x 32 and 96 x 96 px.

    Args:
        num_classes: Classes C.
        beside: Evaluate in a process of its own, `CHUNK` images at a time, while others are added.

    Attributes:
        count: Images so far.
        names: Their files.
    """

    def __init__(self, num_classes: int, *, beside: bool = False) -> None:
        self.num_classes = num_classes
        # Where a fork is safe, and allowed: a process of a pool may have none
        self.beside = beside and sys.platform == "linux" and not multiprocessing.current_process().daemon
        self.count = 0
        self.names: list[str] = []
        self._images: list[Image] = []  # not evaluated yet
        self._chunks: list[tuple[list[Image], Future[Evaluated] | None]] = []  # None: of a process that is gone
        self._pool: ProcessPoolExecutor | None = None
        self._has_objects = False
        self._evaluated: list[Evaluated] | None = None  # of all images, in their order

    def add(
        self,
        true_boxes: np.ndarray,
        true_classes: np.ndarray,
        boxes: np.ndarray,
        scores: np.ndarray,
        classes: np.ndarray,
        *,
        name: str = "",
    ) -> None:
        """Add one image.

        Args:
            true_boxes: (M, 4) xyxy in pixels of the original image.
            true_classes: (M,).
            boxes: (N, 4) likewise, of the detections.
            scores: (N,).
            classes: (N,).
            name: Of the image's file.
        """
        self.count += 1
        self.names.append(name)
        self._evaluated = None
        self._has_objects |= len(true_classes) > 0
        self._images.append((true_boxes, true_classes, boxes, scores, classes))
        if self.beside and len(self._images) == CHUNK:
            self._chunks.append((self._images, self._submit(self._images, self.count - CHUNK)))
            self._images = []

    def _submit(self, images: list[Image], first: int) -> Future[Evaluated] | None:
        if self._pool is None:  # a fork, as a loader's workers are: it needs nothing but NumPy, and never touches a GPU
            context = multiprocessing.get_context("fork")
            self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_end_with, initargs=(os.getpid(),))
        try:
            return self._pool.submit(evaluate, images, self.num_classes, first)
        except (BrokenProcessPool, OSError, RuntimeError):  # no memory for a process, or none may be started now
            return None

    def _results(self) -> list[Evaluated]:
        found: list[Evaluated] = []
        first, killed = 0, False
        for images, chunk in self._chunks:
            try:
                evaluated = chunk.result() if chunk else None
            except BrokenProcessPool:
                evaluated = None
            killed |= evaluated is None
            found.append(evaluate(images, self.num_classes, first) if evaluated is None else evaluated)
            first += len(images)
        if killed:
            LOGGER.warning(
                "the process that evaluates beside the inference could not be started or was ended from outside, as "
                "the system does where memory runs out: what it had not finished was evaluated here."
            )
        if self._images:
            found.append(evaluate(self._images, self.num_classes, first))
        return found

    def _all_results(self) -> list[Evaluated]:
        """Those of all images, in their order: what asks for them again has them from before."""
        if self._evaluated is None:
            self._evaluated = self._results()
            if self._pool:
                self._pool.shutdown()
                self._pool = None
        return self._evaluated

    @classmethod
    def merged(cls, parts: Sequence[CocoAccumulator]) -> CocoAccumulator:
        """All images of several accumulators, of which none evaluates beside."""
        whole = cls(parts[0].num_classes)
        if any(part._chunks for part in parts):
            raise ValueError("an accumulator that evaluates beside cannot be merged.")
        for part in parts:
            for image, name in zip(part._images, part.names, strict=True):
                whole.add(*image, name=name)
        return whole

    def columns(self) -> dict[str, float]:
        """The ten columns in percent, once all images are there; -1 for a size range without objects, as pycocotools.

        Every mean is pycocotools' own, to the last bit: what it accumulates lies in the order of the images whether an
        entry is of one of them or of a chunk.
        """
        evaluation = COCOeval(iouType="bbox")
        chunks = self._all_results()
        if not self._has_objects:
            return dict.fromkeys(COLUMNS, -1.0)
        evaluation.params.catIds, evaluation.params.imgIds = list(range(self.num_classes)), list(range(len(chunks)))
        evaluation._paramsEval = evaluation.params
        evaluation.evalImgs = [entry for entries in zip(*chunks, strict=True) for entry in entries]
        limits = evaluation.params.maxDets
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
            # An image's detections were limited when it was evaluated; AR at 1 and at 10 of them are no columns
            evaluation.params.maxDets = [*limits[:2], _ALL]
            evaluation.accumulate()
            evaluation.params.maxDets = limits
            evaluation.summarize()
        return {name: _percent(evaluation.stats[i]) for name, i in _STATS.items()}

    def matches(self) -> Matches:
        """Which detections were right, of all sizes: what mAP is computed from, once all images are there."""
        params, chunks = COCOeval(iouType="bbox").params, self._all_results()
        of_all_sizes = range(0, self.num_classes * len(params.areaRng), len(params.areaRng))  # the first of each class
        entries = ([entry for chunk in chunks if (entry := chunk[i]) is not None] for i in of_all_sizes)
        return collected(entries, self.names, len(params.iouThrs))


def _end_with(parent: int) -> None:
    """In the process beside: end when the parent does, also where that is killed, and leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):  # a libc without it
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it was killed before
        os._exit(1)


def evaluate(images: Sequence[Image], num_classes: int, first: int = 0) -> Evaluated:
    """What pycocotools accumulates, of some images together: for each class, and in it for each range of area.

    Args:
        images: As `CocoAccumulator.add` takes them.
        num_classes: Classes C.
        first: Index of the first image among all.

    Returns:
        C * A entries of scores (D,), matches (T, D), ignored detections (T, D) and ignored objects (G,), in the order
        of the images, with the image of each detection (D,) and object (G,); None where there is neither.
    """
    truth, found = COCO(), COCO()
    annotations: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for image, (true_boxes, true_classes, boxes, scores, classes) in enumerate(images, first):
        for box, label in zip(_xyxy_to_ltwh(true_boxes), true_classes, strict=True):
            row = {"id": len(annotations) + 1, "image_id": image, "category_id": int(label), "iscrowd": 0}
            annotations.append({**row, "bbox": box, "area": box[2] * box[3]})
        for box, score, label in zip(_xyxy_to_ltwh(boxes), scores.tolist(), classes, strict=True):
            detections.append({"image_id": image, "category_id": int(label), "bbox": box, "score": score})
    truth.dataset = {
        "info": {},
        "images": [{"id": first + i} for i in range(len(images))],
        "annotations": annotations,
        "categories": [{"id": i, "name": str(i)} for i in range(num_classes)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(detections) if detections else found, "bbox")
        evaluation.evaluate()
    found_by_image = evaluation.evalImgs  # class by class, range by range, image by image
    rows = [found_by_image[i : i + len(images)] for i in range(0, len(found_by_image), len(images))]
    return [_joined([entry for entry in row if entry is not None]) for row in rows]


def _joined(entries: list[dict[str, Any]]) -> dict[str, np.ndarray] | None:
    """The entries of several images as one."""
    if not entries:
        return None
    return {
        "dtScores": np.concatenate([entry["dtScores"] for entry in entries]),
        "dtMatches": np.concatenate([entry["dtMatches"] for entry in entries], axis=1) != 0,  # numbers from 1 on
        "dtIgnore": np.concatenate([entry["dtIgnore"] for entry in entries], axis=1),
        "gtIgnore": np.concatenate([entry["gtIgnore"] for entry in entries]),
        "dtImages": _image_of_each(entries, "dtIds"),
        "gtImages": _image_of_each(entries, "gtIds"),
    }


def _image_of_each(entries: list[dict[str, Any]], key: str) -> np.ndarray:
    return np.repeat([entry["image_id"] for entry in entries], [len(entry[key]) for entry in entries]).astype(np.int32)


def _percent(value: float) -> float:
    return round(100 * float(value), 4) if value >= 0 else -1.0


def _xyxy_to_ltwh(boxes: np.ndarray) -> list[list[float]]:
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()


def format_row(columns: dict[str, float], name: str = "") -> str:
    """The ten columns as a head line and a row."""
    head = " ".join(f"{column:>6}" for column in COLUMNS)
    row = " ".join(f"{columns[column]:6.1f}" if columns[column] >= 0 else "     -" for column in COLUMNS)
    width = max(len(name), 8)
    return f"{'':{width}} {head}\n{name:{width}} {row}"
