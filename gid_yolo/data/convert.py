"""PASCAL VOC and COCO annotations as Ultralytics data sets.

Ultralytics' own `convert_coco` falls short here: it numbers classes by COCO's fixed table or as ``id - 1``, writes no
label file for an image without objects and no data yaml, does not clip boxes, and starts a new folder at each call.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from gid_yolo.data.cache import cache_dir, write_once
from gid_yolo.data.coco import coco_categories, load_coco, read_coco
from gid_yolo.data.records import ConversionSummary, SplitRecords, image_files, write_set
from gid_yolo.data.voc import is_voc, read_voc, split_lists
from gid_yolo.errors import UserError

LOGGER = logging.getLogger("gid_yolo")

_VERSION = "1"  # part of the fingerprint: a change of what is written needs a new one
_SPLITS = ("train", "val", "test")


def prepare_data(data: str | Path) -> Path:
    """Return the absolute path of an Ultralytics data yaml for what `data` names.

    - A yaml whose splits are folders or lists of images is returned as it is.
    - A folder in VOC's layout is converted (see `gid_yolo.data.voc`).
    - A yaml with a split ``{images: <folder>, annotations: <COCO's JSON>}`` is converted (see `gid_yolo.data.coco`);
      its other splits stay the folders they are. Paths are relative to the yaml, or to its ``path:``, which is
      relative to the yaml. Classes are the JSON's categories in the order of their ids, or ``names:`` of the yaml
      where it has them, matched by name.

    Converted sets lie in the cache under a fingerprint of the sources (paths, sizes and times): they are written once
    and anew when a source changes. Images are links to the originals.

    Raises:
        UserError: one sentence on what is wrong, where, and what to do.

    """
    path = Path(data).expanduser().absolute()
    if path.is_dir():
        return _prepare_voc(path)
    if path.suffix.lower() not in {".yaml", ".yml"}:
        raise UserError(f"{data} is neither a data yaml nor a folder in VOC's layout: give one of them as data=.")
    content = _read_yaml(path)
    if any(isinstance(content.get(split), Mapping) for split in _SPLITS):
        return _prepare_coco(path, content)
    return path


def _prepare_voc(root: Path) -> Path:
    if not is_voc(root):
        yamls = sorted(p.name for p in root.glob("*.y*ml"))
        hint = f"give its {yamls[0]}" if yamls else "add them or give a data yaml"
        raise UserError(f"{root} has no Annotations and ImageSets/Main, so is no data in VOC's layout: {hint}.")
    images = image_files(root, skip=cache_dir())
    sources = [*sorted((root / "Annotations").glob("*.xml")), *split_lists(root).values(), *images]

    def write(folder: Path) -> ConversionSummary:
        splits, names = read_voc(root, images)
        return write_set(folder, splits, {}, names)

    return _convert(root, sources, write)


def _prepare_coco(path: Path, content: dict[str, Any]) -> Path:
    root = path.parent / str(content.get("path") or "")
    pairs: dict[str, tuple[Path, Path]] = {}
    others: dict[str, object] = {}
    for split in _SPLITS:
        value = content.get(split)
        if isinstance(value, Mapping):
            pairs[split] = _coco_pair(value, root, f"{path}: {split!r}")
        elif value:
            others[split] = [str(_existing(root / str(v), f"{path}: {split!r}")) for v in _as_list(value)]
    files = {split: image_files(images, skip=cache_dir()) for split, (images, _) in pairs.items()}
    sources = [path, *(annotations for _, annotations in pairs.values()), *(f for fs in files.values() for f in fs)]

    def write(folder: Path) -> ConversionSummary:
        loaded = {split: load_coco(annotations) for split, (_, annotations) in pairs.items()}
        categories = {split: coco_categories(loaded[split], pairs[split][1]) for split in pairs}
        names = _class_names(content, path, {pairs[split][1]: found for split, found in categories.items()})
        records: dict[str, SplitRecords] = {}
        for split, (images, annotations) in pairs.items():
            records[split] = read_coco(loaded[split], annotations, images, files[split])
        return write_set(folder, records, others, names)

    return _convert(path, sources, write)


def _convert(source: Path, sources: Iterable[Path], write: Callable[[Path], ConversionSummary]) -> Path:
    """Write a converted set to the cache unless that of the same sources is there, and log what it holds."""
    name = re.sub(r"[^\w.-]+", "_", source.stem if source.is_file() else source.name)
    target = cache_dir() / "converted" / f"{name}-{_fingerprint(source, sources)}"

    def write_and_log(folder: Path) -> None:
        LOGGER.info("%s converted to %s: %s", source, target, write(folder))

    return write_once(target, write_and_log)


def _fingerprint(source: Path, sources: Iterable[Path]) -> str:
    digest = hashlib.sha256(f"{_VERSION}\0{source}\0".encode())
    for path in sources:
        try:
            stat = path.stat()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): restore it or correct the link.") from None
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:12]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the path of a data yaml as data=.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML ({' '.join(str(error).split())}): correct it.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no `key: value` pairs: a data yaml has train, val and names.")
    for split in ("train", "val"):
        if not content.get(split):
            raise UserError(f"{path} has no {split!r}: add the folder of its images.")
    return content


def _coco_pair(value: Mapping[str, object], root: Path, where: str) -> tuple[Path, Path]:
    if set(value) != {"images", "annotations"}:
        raise UserError(f"{where} has the keys {sorted(map(str, value))}: give exactly images and annotations.")
    images, annotations = (root / str(value[key]) for key in ("images", "annotations"))
    if not images.is_dir():
        raise UserError(f"{where}: {images} is not a folder: correct `images`.")
    return images.resolve(), _existing(annotations, where)


def _class_names(content: dict[str, Any], path: Path, categories: Mapping[Path, dict[int, str]]) -> list[str]:
    """Return the class names in the order of their indices: the yaml's, or else those that all JSON files share."""
    (first, expected), *rest = categories.items()
    names = content.get("names")
    if not names:
        for other, found in rest:
            if found != expected:
                raise UserError(f"{other} has other categories than {first}: use the same or add `names` to {path}.")
        return list(expected.values())
    given = [str(n) for n in (dict(sorted(names.items())).values() if isinstance(names, dict) else _as_list(names))]
    for annotations, found in categories.items():
        if missing := sorted(set(found.values()) - set(given)):
            raise UserError(f"{annotations} has the category {missing[0]!r}, which `names` of {path} lacks: add it.")
    return given


def _existing(path: Path, where: str) -> Path:
    if not path.exists():
        raise UserError(f"{where}: {path} does not exist: correct the path.")
    return path.resolve()


def _as_list(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [value]
