"""Which detections were right, image by image: all that mAP needs, of these images or of others drawn from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gid_yolo.files import replaced

FILE = "coco_matches.npz"  # beside `coco_metrics.json`

Entry = dict[str, np.ndarray]  # as `coco_eval.evaluate` gives it


@dataclass(frozen=True, eq=False)
class Matches:
    """I images with D detections and G objects, of all sizes, at T IoUs.

    Attributes:
        names: (I,) files, without the folder that all of them lie in, so that data may be moved.
        classes: (D,) of the detections: class by class, in each in the order in which pycocotools counts them, the
            highest score first.
        images: (D,) index of the image that each is of.
        matched: (T, D) bool, whether it found an object.
        object_classes: (G,).
        object_images: (G,).

    Raises:
        ValueError: Arrays that do not belong together.
    """

    names: np.ndarray
    classes: np.ndarray
    images: np.ndarray
    matched: np.ndarray
    object_classes: np.ndarray
    object_images: np.ndarray

    def __post_init__(self) -> None:
        of_images = self.images.shape == self.classes.shape == self.matched.shape[1:]
        of_objects = self.object_images.shape == self.object_classes.shape
        indices = np.concatenate([self.images.ravel(), self.object_images.ravel()])
        inside = not len(indices) or 0 <= indices.min() <= indices.max() < len(self.names)
        of_one_axis = self.names.ndim == self.images.ndim == self.object_images.ndim == 1
        if not (of_images and of_objects and inside and of_one_axis and indices.dtype.kind == "i"):
            raise ValueError("arrays of detections, objects and images that do not belong together.")


def collected(entries: Iterable[Sequence[Entry]], names: Sequence[str], thresholds: int) -> Matches:
    """The matches of all images.

    Args:
        entries: Of each class, what was evaluated of it, in the order of the images.
        names: (I,) files.
        thresholds: IoUs T.
    """
    classes, images, objects = [np.zeros(0, int)], [np.zeros(0, int)], [np.zeros(0, int)]
    object_classes, matched = [np.zeros(0, int)], [np.zeros((thresholds, 0), bool)]
    for label, parts in enumerate(entries):
        if not parts:
            continue
        scores, of, true = (
            np.concatenate([part[key] for part in parts]) for key in ("dtScores", "dtImages", "gtImages")
        )
        right, ignored = (np.concatenate([part[key] for part in parts], axis=1) for key in ("dtMatches", "dtIgnore"))
        order = np.argsort(-scores, kind="mergesort")  # pycocotools' own, so that equal scores stay in its order
        order = order[~ignored[:, order].all(axis=0)]  # a box of no possible area is neither right nor wrong
        images.append(of[order])
        classes.append(np.full(len(order), label))
        matched.append(right[:, order] & ~ignored[:, order])
        objects.append(true[np.concatenate([part["gtIgnore"] for part in parts]) == 0])
        object_classes.append(np.full(len(objects[-1]), label))
    joined = (np.concatenate(arrays).astype(np.int32) for arrays in (classes, images, object_classes, objects))
    of_classes, of_images, true_classes, true_images = joined
    whole = np.concatenate(matched, axis=1)
    return Matches(np.array(_below(names), dtype=str), of_classes, of_images, whole, true_classes, true_images)


def _below(names: Sequence[str]) -> list[str]:
    """The files without the folder that all of them lie in."""
    folders = [Path(name).parent.parts for name in names]
    levels = enumerate(zip(*folders, strict=False))
    common = next((i for i, level in levels if len(set(level)) > 1), min(map(len, folders), default=0))
    return ["/".join(Path(name).parts[common:]) for name in names]


def write_matches(matches: Matches, path: Path) -> None:
    """Write a file of NumPy's, compressed; matches take a bit each.

    Raises:
        OSError: It cannot be written.
    """
    packed = {**vars(matches), "matched": np.packbits(matches.matched, axis=1)}
    with replaced(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **packed)


def read_matches(path: Path) -> Matches | None:
    """What `write_matches` wrote; None where there is no such file, or a damaged one, or another under its name."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in Matches.__dataclass_fields__}
        count, packed = len(arrays["classes"]), arrays["matched"]
        if packed.shape[1] != -(-count // 8):
            return None
        return Matches(**{**arrays, "matched": np.unpackbits(packed, axis=1, count=count).astype(bool)})
    except Exception:  # of a damaged archive, NumPy and zipfile raise any of them
        return None
