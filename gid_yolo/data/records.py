"""What every annotation format is read into, and how that is written in Ultralytics' layout."""

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import yaml

from gid_yolo.data.cache import DATA_YAML
from gid_yolo.errors import UserError

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class AnnotatedImage:
    """An image file and its objects.

    `name` is the file's path below ``images/<split>/``; `size` is (width, height) in pixels; `boxes` are xyxy in
    pixels measured on pixel edges (0 is the left edge of the first pixel), not clipped; `labels` are the class names.
    """

    source: Path
    name: str
    size: tuple[int, int]
    boxes: tuple[Box, ...]
    labels: tuple[str, ...]


@dataclass
class SplitRecords:
    """The images of one split, and how many objects its reader left out."""

    images: list[AnnotatedImage] = field(default_factory=list)
    dropped_crowd: int = 0
    dropped_difficult: int = 0


@dataclass(frozen=True)
class ConversionSummary:
    """What a conversion wrote and what it left out, over all its splits."""

    images: int
    boxes: int
    dropped_crowd: int
    dropped_difficult: int
    dropped_empty: int

    def __str__(self) -> str:
        return (
            f"{self.images} images, {self.boxes} boxes; left out: {self.dropped_crowd} crowd, "
            f"{self.dropped_difficult} difficult, {self.dropped_empty} without area in the image"
        )


def parse_box(values: Sequence[object], where: str) -> Box:
    """Return four finite numbers as floats.

    Raises:
        UserError: they are not; `where` names the entry.

    """
    try:
        numbers = [float(v) for v in values]  # type: ignore[arg-type]  # what float() refuses is the error
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
        raise UserError(f"{where} has the box {list(values)}, which is not four numbers: correct or remove it.")
    return numbers[0], numbers[1], numbers[2], numbers[3]


def write_set(
    folder: Path, splits: Mapping[str, SplitRecords], others: Mapping[str, object], names: Sequence[str]
) -> ConversionSummary:
    """Write images (as links where the system allows), labels and ``data.yaml`` into an empty `folder`.

    Boxes are clipped to the image and dropped where nothing is left. An image without boxes gets an empty label file:
    it is a negative, not an image to skip. `others` are splits that are written into ``data.yaml`` as they are.

    Raises:
        UserError: two images would share a label file, or ``train`` has no box.

    """
    indices = {name: index for index, name in enumerate(names)}
    boxes, empty = 0, 0
    for split, records in splits.items():
        written, taken = 0, dict[Path, Path]()
        for image in records.images:
            lines, dropped = _label_lines(image, indices)
            link = folder / "images" / split / image.name
            label = (folder / "labels" / split / image.name).with_suffix(".txt")
            if label in taken:
                raise UserError(f"{taken[label]} and {image.source} would share a label file: rename one of them.")
            taken[label] = image.source
            link.parent.mkdir(parents=True, exist_ok=True)
            label.parent.mkdir(parents=True, exist_ok=True)
            _link(image.source, link)
            label.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            written, empty = written + len(lines), empty + dropped
        if split == "train" and not written:
            raise UserError(
                f"none of the {len(records.images)} training images has a box: check that the annotations belong to "
                "the images and that their boxes lie inside."
            )
        boxes += written
    data = {**{split: f"images/{split}" for split in splits}, **others, "names": dict(enumerate(names))}
    (folder / DATA_YAML).write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return ConversionSummary(
        images=sum(len(r.images) for r in splits.values()),
        boxes=boxes,
        dropped_crowd=sum(r.dropped_crowd for r in splits.values()),
        dropped_difficult=sum(r.dropped_difficult for r in splits.values()),
        dropped_empty=empty,
    )


def image_files(folder: Path, skip: Path) -> list[Path]:
    """Return all image files below `folder` but not below `skip`, sorted."""
    found: Iterable[Path] = (p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(p for p in found if not p.is_relative_to(skip))


def is_inside(name: str) -> bool:
    """Tell whether a file name from an annotation stays below the folder it is joined to."""
    path = PurePosixPath(name.replace("\\", "/"))
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts and ":" not in path.parts[0]


def _label_lines(image: AnnotatedImage, indices: Mapping[str, int]) -> tuple[list[str], int]:
    """Return the lines ``class x y w h`` (centre, shares of the image) and the number of boxes dropped."""
    width, height = image.size
    lines = []
    for (x1, y1, x2, y2), label in zip(image.boxes, image.labels, strict=True):
        x1, x2 = (min(max(x, 0.0), width) for x in (x1, x2))
        y1, y2 = (min(max(y, 0.0), height) for y in (y1, y2))
        if x1 < x2 and y1 < y2:
            row = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
            lines.append(f"{indices[label]} " + " ".join(f"{v:.8g}" for v in row))
    return lines, len(image.boxes) - len(lines)


def _link(source: Path, link: Path) -> None:
    try:
        link.symlink_to(source.resolve())
    except (OSError, NotImplementedError):  # some file systems and Windows accounts have no links
        shutil.copy2(source, link)
