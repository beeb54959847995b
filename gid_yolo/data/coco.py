"""COCO's JSON of instances: boxes (x, y, width, height) in pixels measured on pixel edges from 0."""

import json
from pathlib import Path
from typing import Any

from gid_yolo.data.records import AnnotatedImage, Box, SplitRecords, is_inside, parse_box
from gid_yolo.errors import UserError


def load_coco(path: Path) -> dict[str, Any]:
    """Read a JSON file that has lists ``images``, ``annotations`` and ``categories`` of objects.

    Raises:
        UserError: it is missing, no JSON, or lacks one of them.

    """
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): correct `annotations` in the data yaml.") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): write it again.") from None
    for key in ("images", "annotations", "categories"):
        entries = data.get(key) if isinstance(data, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{path} has no list of objects {key!r}: give COCO's instances JSON.")
    return data


def coco_categories(data: dict[str, Any], path: Path) -> dict[int, str]:
    """Return the class name of each category id, in the order of the ids (COCO's own ids have gaps).

    Raises:
        UserError: a category lacks its id or name, or one of them occurs twice.

    """
    found: dict[int, str] = {}
    for number, entry in enumerate(data["categories"], start=1):
        where = f"{path}: category {number}"
        key, name = _field(entry, "id", int, where), _field(entry, "name", str, where)
        if key in found or name in found.values():
            raise UserError(f"{where} repeats the id {key} or the name {name!r}: make both unique.")
        found[key] = name
    return dict(sorted(found.items()))


def read_coco(data: dict[str, Any], path: Path, folder: Path, files: list[Path]) -> SplitRecords:
    """Turn a loaded JSON file into records; `files` are the image files below `folder`, `path` is for messages.

    Crowd regions (``iscrowd``) are left out and counted: a label file cannot mark them, and as plain boxes they would
    teach that a crowd is one object. Every image is kept, also one without annotations.

    Raises:
        UserError: an entry lacks a field or points to an unknown image or category, or an image is missing on disk.

    """
    categories = coco_categories(data, path)
    there = {file.relative_to(folder).as_posix() for file in files}
    records = SplitRecords()
    images: dict[int | str, tuple[str, tuple[int, int]]] = {}
    objects: dict[int | str, list[tuple[Box, str]]] = {}
    for number, entry in enumerate(data["images"], start=1):
        where = f"{path}: image {number}"
        key, name = _field(entry, "id", (int, str), where), _field(entry, "file_name", str, where)
        size = _field(entry, "width", int, where), _field(entry, "height", int, where)
        if key in images or min(size) <= 0:
            raise UserError(f"{where} repeats the id {key!r} or has an impossible size {size}: correct it.")
        if not is_inside(name) or name not in there:
            raise UserError(f"{where}: {folder / name} is not an image below {folder}: add it or correct `images`.")
        images[key], objects[key] = (name, size), []
    for number, entry in enumerate(data["annotations"], start=1):
        where = f"{path}: annotation {number} (id {entry.get('id')})"
        image, category = _field(entry, "image_id", (int, str), where), _field(entry, "category_id", int, where)
        if image not in images:
            raise UserError(f"{where} belongs to image {image!r}, which is not in the file: correct or remove it.")
        if category not in categories:
            raise UserError(f"{where} has the unknown category id {category}: correct it or add the category.")
        if entry.get("iscrowd"):
            records.dropped_crowd += 1
            continue
        x, y, width, height = parse_box(_field(entry, "bbox", list, where), where)
        objects[image].append(((x, y, x + width, y + height), categories[category]))
    for key, (name, size) in images.items():
        boxes, labels = tuple(box for box, _ in objects[key]), tuple(label for _, label in objects[key])
        records.images.append(AnnotatedImage(folder / name, name, size, boxes, labels))
    return records


def _field(entry: dict[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    value = entry.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{where} has {value!r} as {key!r}: give it a value of the right type.")
    return value
