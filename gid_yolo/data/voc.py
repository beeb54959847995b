"""PASCAL VOC: a folder with ``Annotations/*.xml`` and ``ImageSets/Main/<split>.txt``.

VOC's boxes are pixels counted from 1, both corners inside the object (the devkit's ``VOCcode`` measures a side as
``max - min + 1``). On pixel edges counted from 0 the box is therefore (xmin - 1, ymin - 1, xmax, ymax). Sets whose
authors counted from 0 come out up to one pixel too large to the upper left; nothing in the XML tells them apart.
"""

from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image, UnidentifiedImageError

from gid_yolo.data.records import AnnotatedImage, Box, SplitRecords, parse_box
from gid_yolo.errors import UserError

# The first list that exists is the split. Where only VOC's trainval.txt is there to train on, val.txt is a part of it.
_LISTS = {"train": ("train", "trainval"), "val": ("val", "test"), "test": ("test",)}
_LISTS_OF_TRAINVAL = {"train": ("trainval",), "val": ("test", "val"), "test": ("test",)}
_MASK_FOLDERS = {"SegmentationClass", "SegmentationObject"}  # VOC's masks have the stems of its images


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses a document type before an entity in it is expanded, which could fill the memory."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise UserError("")


def is_voc(folder: Path) -> bool:
    """Tell whether a folder has the two parts that make it VOC's layout."""
    return (folder / "Annotations").is_dir() and (folder / "ImageSets" / "Main").is_dir()


def split_lists(root: Path) -> dict[str, Path]:
    """Return the list file of each split: ``train`` and ``val`` always, ``test`` where there is one.

    ``trainval.txt`` stands in for a missing ``train.txt``, and ``test.txt`` for a missing ``val.txt``.

    Raises:
        UserError: there is nothing to train on or nothing to validate on.

    """
    folder = root / "ImageSets" / "Main"
    rules = _LISTS if (folder / "train.txt").is_file() else _LISTS_OF_TRAINVAL
    found = {}
    for split, stems in rules.items():
        path = next((p for stem in stems if (p := folder / f"{stem}.txt").is_file()), None)
        if path is not None:
            found[split] = path
        elif split != "test":
            raise UserError(f"{folder} has no {' or '.join(f'{s}.txt' for s in stems)}: add a list of image names.")
    return found


def read_voc(root: Path, images: list[Path]) -> tuple[dict[str, SplitRecords], list[str]]:
    """Read all splits of a VOC folder; `images` are the image files below it.

    Objects marked `difficult` are kept in ``train`` (they are real) and left out of ``val`` and ``test``, where the
    devkit counts them neither as hits nor as misses. Class names are sorted, those of difficult objects among them.

    Returns:
        The records of each split, and the class names in the order of their indices.

    Raises:
        UserError: a list, an XML file or an image is missing or wrong.

    """
    by_stem, by_name = defaultdict(list), defaultdict(list)
    for path in images:
        if not _MASK_FOLDERS & set(path.relative_to(root).parts):
            by_stem[path.stem].append(path)
            by_name[path.name].append(path)
    splits: dict[str, SplitRecords] = {}
    names: set[str] = set()
    for split, path in split_lists(root).items():
        records = splits[split] = SplitRecords()
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        for entry in dict.fromkeys(line.strip() for line in lines if line.strip()):
            xml = root / "Annotations" / f"{entry}.xml"
            if Path(entry).name != entry or not xml.is_file():
                raise UserError(f"{path} lists {entry!r}, but {xml} does not exist: add it or remove the line.")
            tree = _parse(xml)
            filename = (tree.findtext("filename") or "").strip()
            # The devkit finds an image by the name of its XML; <filename> decides between several, or where none is.
            found = by_stem[entry] or by_name[filename]
            found = [p for p in found if p.name == filename] or found
            found = [p for p in found if p.parent.name in ("JPEGImages", split)] or found
            if len(found) != 1:
                problem = "is not there" if not found else f"could be {found[0]} or {found[1]}"
                raise UserError(f"{xml}: its image {filename or entry!r} {problem}: keep one of that name in {root}.")
            boxes, labels = [], []
            for number, thing in enumerate(tree.findall("object"), start=1):
                box, label = _read_object(thing, f"{xml}: object {number}")
                names.add(label)
                if split != "train" and (thing.findtext("difficult") or "0").strip() not in ("0", ""):
                    records.dropped_difficult += 1
                    continue
                boxes.append(box)
                labels.append(label)
            size = _size(tree, found[0])
            records.images.append(AnnotatedImage(found[0], found[0].name, size, tuple(boxes), tuple(labels)))
    return splits, sorted(names)


def _parse(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.XML(path.read_bytes(), parser=ElementTree.XMLParser(target=_NoDoctype()))
    except UserError:
        raise UserError(
            f"{path} has a DOCTYPE, which no VOC file needs and which can hide an attack: remove it."
        ) from None
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # the last two: an unknown encoding
        raise UserError(f"{path} is not readable XML ({error}): write it again.") from None


def _read_object(thing: ElementTree.Element, where: str) -> tuple[Box, str]:
    label, box = (thing.findtext("name") or "").strip(), thing.find("bndbox")
    if not label or box is None:
        raise UserError(f"{where} has no {'<name>' if not label else '<bndbox>'}: add it or remove the object.")
    corners = [box.findtext(key) for key in ("xmin", "ymin", "xmax", "ymax")]
    x1, y1, x2, y2 = parse_box(corners, where)
    return (x1 - 1, y1 - 1, x2, y2), label


def _size(tree: ElementTree.Element, image: Path) -> tuple[int, int]:
    """Return (width, height) as the XML says, or as the image does where the XML has none or zeros."""
    try:
        width, height = (int(float(tree.findtext(f"size/{key}") or 0)) for key in ("width", "height"))
    except (ValueError, OverflowError):
        width = height = 0
    if width > 0 and height > 0:
        return width, height
    try:
        with Image.open(image) as opened:
            return opened.size
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{image} is not a readable image ({error}): replace it.") from None
