"""COCO: one JSON file a split."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from gid_yolo.data.convert import SPLITS, Annotations, LabelledImage, find_images, read_box
from gid_yolo.errors import UserError


def coco_sources(path: Path, contents: dict[str, Any]) -> list[Path]:
    """The JSON files and the images that a data yaml names.

    Raises:
        UserError: A split lacks `images:` or `annotations:`, or names a file that does not exist.
    """
    pairs = [_files(path, contents, split) for split in SPLITS if isinstance(contents.get(split), dict)]
    return [source for folder, file in pairs for source in (file, *find_images(folder))]


def read_coco(path: Path, contents: dict[str, Any]) -> Annotations:
    """Read a data yaml of which at least one split is COCO JSON; the others stay the folders they are.

    Classes are numbered in the order of the category ids, or as `names:` of the yaml where it has them, matched by
    name; categories without objects keep their number. Boxes marked `iscrowd` are left out, since Ultralytics' labels
    cannot mark them. Images without objects stay.

    Raises:
        UserError: A file or an entry that cannot be used, by name.
    """
    names = _given_names(contents)
    found = Annotations([], {}, {"iscrowd": 0})
    for split in SPLITS:
        entry = contents.get(split)
        if isinstance(entry, dict):
            folder, file = _files(path, contents, split)
            data = _load(file)
            categories = _categories(file, data)
            if names is None:
                names = list(categories.values())
            elif "names" in contents and (missing := sorted(set(categories.values()) - set(names))):
                raise UserError(f"{file} has the category '{missing[0]}', which 'names:' of {path} lacks: add it.")
            elif "names" not in contents and list(categories.values()) != names:
                raise UserError(f"{file} has other categories than the split before it: give all splits the same ones.")
            index = {key: names.index(name) for key, name in categories.items()}
            found.splits[split] = _images(file, folder, data, index, found.dropped)
        elif entry:
            places = [_existing(path, contents, split, place) for place in _as_list(entry)]
            found.others[split] = [str(p) for p in places] if len(places) > 1 else str(places[0])
    found.names = names or []
    return found


def _files(path: Path, contents: dict[str, Any], split: str) -> tuple[Path, Path]:
    entry = contents[split]
    for key in ("images", "annotations"):
        if not entry.get(key):
            raise UserError(f"{path}: '{split}:' has no '{key}:'; write {{images: folder, annotations: file.json}}.")
    folder, file = (_existing(path, contents, split, entry[key]) for key in ("images", "annotations"))
    if not folder.is_dir():
        raise UserError(f"{path}: 'images:' of '{split}:' is {folder}, which is not a folder: give a folder.")
    return folder, file


def _existing(path: Path, contents: dict[str, Any], split: str, place: object) -> Path:
    found = (path.parent / str(contents.get("path") or "") / str(place)).resolve()
    if not found.exists():
        raise UserError(f"{path}: '{split}:' names {found}, which does not exist: correct the path.")
    return found


def _given_names(contents: dict[str, Any]) -> list[str] | None:
    names = contents.get("names")
    if isinstance(names, dict):
        return [str(names[key]) for key in sorted(names)]
    return [str(name) for name in _as_list(names)] if names else None


def _as_list(value: object) -> list[object]:
    return list(value) if isinstance(value, list) else [value]


def _load(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not a JSON file: {' '.join(str(error).split())[:120]}.") from error
    for key in ("images", "annotations", "categories"):
        rows = data.get(key) if isinstance(data, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{file} has no list '{key}': give COCO's file of instances.")
    return data


def _categories(file: Path, data: dict[str, Any]) -> dict[int, str]:
    """Class name of each category id, in the order of the ids (COCO's own have gaps)."""
    found: dict[int, str] = {}
    for number, row in enumerate(data["categories"], start=1):
        where = f"{file}: category {number}"
        key, name = _field(row, "id", int, where), _field(row, "name", str, where)
        if key in found or name in found.values():
            raise UserError(f"{where} repeats the id {key} or the name '{name}': make both unique.")
        found[key] = name
    return dict(sorted(found.items()))


def _images(
    file: Path, folder: Path, data: dict[str, Any], index: dict[int, int], dropped: dict[str, int]
) -> list[LabelledImage]:
    on_disk = defaultdict(list)  # by path below the folder, and by name for files that moved to another folder
    for place in find_images(folder):
        for key in {place.relative_to(folder).as_posix(), place.name}:
            on_disk[key].append(place)
    images: dict[object, LabelledImage] = {}
    for number, row in enumerate(data["images"], start=1):
        where = f"{file}: image {number}"
        name, key = _field(row, "file_name", str, where), _field(row, "id", (int, str), where)
        size = _field(row, "width", (int, float), where), _field(row, "height", (int, float), where)
        if key in images or min(size) <= 0:
            raise UserError(f"{where} repeats the id {key} or has the impossible size {size}: correct it.")
        exact = [p for p in on_disk[name] if p == folder / name]
        found = exact or on_disk[Path(name).name]
        if len(found) != 1:
            problem = f"could be {found[0]} or {found[1]}" if found else f"is not below {folder}"
            raise UserError(f"{where}: '{name}' {problem}: correct 'file_name' or 'images:'.")
        images[key] = LabelledImage(found[0], found[0].relative_to(folder), size)
    for number, row in enumerate(data["annotations"], start=1):
        where = f"{file}: annotation {number} (id {row.get('id')})"
        image, category = _field(row, "image_id", (int, str), where), _field(row, "category_id", int, where)
        for kind, key, known in (("image", image, images), ("category", category, index)):
            if key not in known:
                raise UserError(
                    f"{where} names the {kind} {key!r}, which the file does not have: correct or remove it."
                )
        if row.get("iscrowd"):
            dropped["iscrowd"] += 1
            continue
        x, y, width, height = read_box(_field(row, "bbox", list, where), where)
        images[image].objects.append((index[category], (x, y, x + width, y + height)))
    return list(images.values())


def _field(row: dict[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    value = row.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{where} has no usable '{key}' ({value!r}): correct it.")
    return value
