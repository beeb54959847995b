"""PASCAL VOC: one XML file an image, lists of names a split."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from gid_yolo.data.convert import SPLITS, Annotations, LabelledImage, read_box
from gid_yolo.errors import UserError

_MASK_FOLDERS = {"SegmentationClass", "SegmentationObject"}  # VOC's masks have the stems of its images


class _NoDoctype(ElementTree.TreeBuilder):
    """Stops at a document type, before an entity in it can expand without bound."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise UserError("DOCTYPE")


def is_voc(folder: Path) -> bool:
    """True for a folder in VOC's layout."""
    return any((folder / "Annotations").glob("*.xml")) and any((folder / "ImageSets" / "Main").glob("*.txt"))


def read_voc(folder: Path, files: Sequence[Path]) -> Annotations:
    """Read a folder in VOC's layout, `files` being the images below it; classes are numbered in alphabetical order.

    Corners in VOC count pixels from 1 and include the last one (the devkit's convention), so the box in continuous
    coordinates is (xmin - 1, ymin - 1, xmax, ymax). Objects marked `difficult` are trained on, but left out of val and
    test, as VOC's own evaluation leaves them out. `trainval.txt` stands in for a missing `train.txt`, and is then
    validated on `test.txt` where there is one; `test.txt` stands in for a missing `val.txt`.

    Raises:
        UserError: A split, an XML file or an image that cannot be used, by name.
    """
    lists = {split: folder / "ImageSets" / "Main" / f"{split}.txt" for split in SPLITS}
    if not lists["train"].is_file():  # VOC's usual protocol: val.txt would be a part of trainval.txt
        lists["train"] = lists["train"].with_name("trainval.txt")
        lists["val"] = lists["test"] if lists["test"].is_file() else lists["val"]
    if not lists["val"].is_file():
        lists["val"] = lists["test"]
    for split in ("train", "val"):
        if not lists[split].is_file():
            raise UserError(f"{folder} has no ImageSets/Main/{split}.txt: list the names of that split's images there.")
    by_name = defaultdict(list)  # by file name and by stem
    for path in files:
        if not _MASK_FOLDERS & set(path.relative_to(folder).parts):
            for key in {path.name, path.stem}:
                by_name[key].append(path)
    dropped = {"difficult (val, test)": 0}
    parsed: dict[str, list[tuple[Path, ElementTree.Element]]] = {}
    for split, path in lists.items():
        if path.is_file():
            text = path.read_text(encoding="utf-8-sig", errors="replace")
            parsed[split] = []
            for stem in dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()):
                root = _parse(folder / "Annotations" / f"{stem}.xml", path)
                parsed[split].append((_image(by_name, root, stem, split), root))
    names = sorted({_text(o, "name") for rows in parsed.values() for _, root in rows for o in root.iter("object")})
    found: dict[str, list[LabelledImage]] = {}
    for split, rows in parsed.items():
        found[split] = []
        for path, root in rows:
            image = LabelledImage(path, Path(path.name), **_size(root, path))
            for item in root.iter("object"):
                if split != "train" and (item.findtext("difficult") or "0").strip() != "0":
                    dropped["difficult (val, test)"] += 1
                    continue
                corners = [_text(item, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
                x1, y1, x2, y2 = read_box(corners, _where(item))
                image.objects.append((names.index(_text(item, "name")), (x1 - 1, y1 - 1, x2, y2)))
            found[split].append(image)
    return Annotations(names, found, dropped)


def _image(by_name: dict[str, list[Path]], root: ElementTree.Element, stem: str, split: str) -> Path:
    """The image of an XML file: that of its stem, as in the devkit; `<filename>` decides where that says too little."""
    filename = (root.findtext("filename") or "").strip()
    found = by_name[stem] or by_name[filename]
    for narrower in (
        [p for p in found if p.name == filename],
        [p for p in found if p.parent.name in ("JPEGImages", split)],
    ):
        found = narrower if narrower else found
    if len(found) != 1:
        problem = f"could be {found[0]} or {found[1]}" if found else "is not below the folder"
        raise UserError(f"{_where(root)}: its image '{filename or stem}' {problem}: keep one image of that name there.")
    return found[0]


def _size(root: ElementTree.Element, path: Path) -> dict[str, Any]:
    """Width and height as the XML says, or as the image does where the XML has none or zeros; and which of both."""
    width, height = (_number(root, f"size/{key}") for key in ("width", "height"))
    if width > 0 and height > 0:
        return {"size": (width, height)}
    try:
        with Image.open(path) as image:
            return {"size": image.size, "sized": False}
    except OSError as error:
        raise UserError(f"{path} is not a readable image ({type(error).__name__}): replace it.") from error


def _parse(path: Path, listed: Path) -> ElementTree.Element:
    if path.parent.name != "Annotations" or not path.is_file():
        raise UserError(f"{listed} lists '{path.stem}', but there is no {path}: add it, or remove the line.")
    try:
        root = ElementTree.fromstring(path.read_bytes(), parser=ElementTree.XMLParser(target=_NoDoctype()))
    except UserError:
        raise UserError(f"{path} declares a DOCTYPE, which annotations do not need: remove it.") from None
    except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:  # the last two: an unknown encoding
        raise UserError(f"{path} is not readable XML ({error}): write it again.") from error
    root.set("file", str(path))
    for number, item in enumerate(root.iter("object"), start=1):
        item.set("file", f"{path}: object {number}")
    return root


def _where(element: ElementTree.Element) -> str:
    return element.get("file", "")


def _text(element: ElementTree.Element, tag: str) -> str:
    text = (element.findtext(tag) or "").strip()
    if not text:
        raise UserError(f"{_where(element)} has no <{tag}>: add it, or remove the {element.tag}.")
    return text


def _number(element: ElementTree.Element, tag: str) -> float:
    try:
        return float(element.findtext(tag) or 0)
    except ValueError:
        return 0.0
