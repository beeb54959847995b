"""PASCAL VOC and COCO annotations as an Ultralytics data set.

Ultralytics' own `convert_coco` numbers classes by COCO's fixed table or as id - 1, writes neither a label file for an
image without objects nor a data yaml, clips no box, and has nothing for VOC XML.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from gid_yolo.cfg import load_yaml
from gid_yolo.data.cache import DATA_YAML, cache_dir, write_once
from gid_yolo.errors import UserError

SPLITS = ("train", "val", "test")
CONVERTED_FROM = "converted_from"  # key of a converted set's yaml: what `data=` named, which may have changed since
IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

LOGGER = logging.getLogger("gid_yolo")


@dataclass
class LabelledImage:
    """One image and its objects.

    Attributes:
        path: The image file.
        name: Where it goes below `images/<split>/`.
        size: (width, height) in pixels.
        objects: Class index and xyxy box in pixels of each object, not yet clipped.
        sized: The annotation says the size; else it is that of the stored pixels.
    """

    path: Path
    name: Path
    size: tuple[float, float]
    objects: list[tuple[int, tuple[float, float, float, float]]] = field(default_factory=list)
    sized: bool = True


@dataclass
class Annotations:
    """What a reader found: class names, the images of each split, and the objects it left out by kind.

    `others` are splits that Ultralytics reads without conversion, as their values in the data yaml.
    """

    names: list[str]
    splits: dict[str, list[LabelledImage]]
    dropped: dict[str, int] = field(default_factory=dict)
    others: dict[str, object] = field(default_factory=dict)


def prepare_data(data: str | Path) -> Path:
    """Return the Ultralytics data yaml for what `data=` names.

    Args:
        data: An Ultralytics data yaml; a folder in VOC's layout (`Annotations/*.xml`, `ImageSets/Main/*.txt`, images
            anywhere below it); or a yaml of which a split is `{images: folder, annotations: instances.json}`; its
            other splits may be folders. Its paths are relative to it, or to its `path:`.

    Returns:
        The yaml itself where Ultralytics can read it, else that of the converted set in the cache, which is made once.

    Raises:
        UserError: Nothing is there, or what is there cannot be used.
    """
    # Not resolved: a yaml may be a link, whose paths are from where it lies
    path = Path(os.path.abspath(Path(data).expanduser()))  # noqa: PTH100
    if path.is_dir():
        from gid_yolo.data.voc import is_voc, read_voc

        if not is_voc(path):
            raise UserError(
                f"data={data} is a folder without Annotations/*.xml and ImageSets/Main/*.txt: give a data yaml, or a "
                "folder in PASCAL VOC's layout."
            )
        lists = sorted((path / "ImageSets" / "Main").glob("*.txt"))
        images = find_images(path)
        sources = [*sorted((path / "Annotations").glob("*.xml")), *lists, *images]
        return _convert(path, sources, lambda: read_voc(path, images))
    if not path.is_file():
        raise UserError(f"data={data} does not exist: give the path of a data yaml, or leave data= out.")
    if path.suffix.lower() not in {".yaml", ".yml"}:
        raise UserError(f"data={data} is not a data yaml: give a .yaml file, or a folder in PASCAL VOC's layout.")
    try:
        contents = load_yaml(path)
    except ValueError as error:
        raise UserError(f"data={error}") from error
    if not contents.get("val") and contents.get("validation"):  # another name of it, to Ultralytics
        contents["val"] = contents["validation"]
    if missing := [split for split in ("train", "val") if not contents.get(split)]:
        raise UserError(f"data={data} has no '{missing[0]}:': say where the images of that split are.")
    if not any(isinstance(contents.get(split), dict) for split in SPLITS):
        return path
    from gid_yolo.data.coco import coco_sources, read_coco

    return _convert(path, [path, *coco_sources(path, contents)], lambda: read_coco(path, contents))


def find_images(folder: Path) -> list[Path]:
    """All image files below a folder and what it links to, sorted; the cache is passed over, should it lie there."""
    cache = cache_dir()
    found: list[Path] = []
    root, visited = folder.resolve(), set[Path]()

    def goes_on(place: Path) -> bool:
        """False of a link to what is walked without it, or was by another."""
        target = place.resolve()
        if not place.is_symlink():
            return True
        seen = target.is_relative_to(root) or root.is_relative_to(target) or target in visited
        visited.add(target)
        return not seen

    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in sorted(folders) if goes_on(Path(place) / name)]
        found += (Path(place) / name for name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES)
    return sorted(p for p in found if not p.is_relative_to(cache))


def read_box(values: Sequence[object], where: str) -> tuple[float, float, float, float]:
    """Four finite numbers of an annotation as floats.

    Raises:
        UserError: They are not; `where` names the entry.
    """
    try:
        numbers = [float(value) for value in values]  # type: ignore[arg-type]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
        raise UserError(f"{where} has the box {list(values)}, which is not four numbers: correct or remove it.")
    return numbers[0], numbers[1], numbers[2], numbers[3]


def _convert(data: Path, sources: Iterable[Path], read: Callable[[], Annotations]) -> Path:
    """Write what `read` returns into the cache, under a name that changes whenever a source file does.

    Images are sources too: a set whose links lead nowhere must not be used again.
    """
    digest = hashlib.sha256()
    for source in sources:
        try:
            status = source.stat()
        except OSError as error:
            raise UserError(f"{source} cannot be read ({error.strerror}): restore it, or mend the link.") from error
        digest.update(f"{source} {status.st_size} {status.st_mtime_ns}\n".encode())
    name = data.name if data.is_dir() else data.stem
    target = cache_dir() / "converted" / f"{name}-{digest.hexdigest()[:12]}"
    made = write_once(target, lambda folder: _write(folder, read(), data))
    LOGGER.info("data: %s", made)
    return made


def _write(folder: Path, found: Annotations, data: Path) -> None:
    from gid_yolo.data.orientation import upright

    dropped = dict(found.dropped)
    total = doubtful = 0
    for split, images in found.splits.items():
        taken: dict[Path, Path] = {}
        for annotated in images:
            image, known = upright(annotated)
            doubtful, lines = doubtful + (not known), []
            for label, box in image.objects:
                row = normalise(box, image.size)
                if row is None:
                    dropped["without area"] = dropped.get("without area", 0) + 1
                else:
                    lines.append(f"{label} " + " ".join(f"{value:.6f}" for value in row) + "\n")
            total += len(lines) if split == "train" else 0
            target = folder / "images" / split / image.name
            label_file = (folder / "labels" / split / image.name).with_suffix(".txt")
            if label_file in taken:  # before anything is written: a copy over a link would reach the original
                raise UserError(f"{taken[label_file]} and {image.path} would share a label file: rename one of them.")
            taken[label_file] = image.path
            target.parent.mkdir(parents=True, exist_ok=True)
            label_file.parent.mkdir(parents=True, exist_ok=True)
            _place(image.path, target)
            label_file.write_text("".join(lines), encoding="utf-8")
    if "train" in found.splits and not total:
        raise UserError(f"the train split of {data} has no boxes: check that its annotations belong to its images.")
    contents = {
        **{split: f"images/{split}" for split in found.splits},
        **found.others,
        "names": dict(enumerate(found.names)),
        CONVERTED_FROM: str(data),
    }
    (folder / DATA_YAML).write_text(yaml.safe_dump(contents, sort_keys=False, allow_unicode=True), encoding="utf-8")
    counts = ", ".join(f"{len(images)} {split}" for split, images in found.splits.items())
    left = (
        "; left out: " + ", ".join(f"{n} {kind}" for kind, n in dropped.items() if n) if any(dropped.values()) else ""
    )
    if doubtful:
        LOGGER.warning(
            "%d images are turned or flipped (EXIF) in a way that their sizes do not tell: boxes are taken to be of "
            "the image as it is shown; look at some.",
            doubtful,
        )
    LOGGER.warning("converted %s images, %d boxes in train, %d classes%s", counts, total, len(found.names), left)


def normalise(box: tuple[float, float, float, float], size: tuple[float, float]) -> tuple[float, ...] | None:
    """Clip an xyxy box in pixels to the image; return centre, width, height in [0, 1], or None without area."""
    width, height = size
    x1, x2 = (min(max(v, 0.0), width) for v in (box[0], box[2]))
    y1, y2 = (min(max(v, 0.0), height) for v in (box[1], box[3]))
    if x2 <= x1 or y2 <= y1:
        return None
    return (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height


def _place(source: Path, target: Path) -> None:
    """Link an image into the set; copy it where links are not to be had."""
    try:
        target.symlink_to(source)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target)
