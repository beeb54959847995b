"""Conversion of VOC and COCO sets made here: conventions, reuse, and one clear sentence per mistake."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from gid_yolo.data import convert, prepare_data
from gid_yolo.errors import UserError


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("GID_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def class_names(path: Path) -> list[str]:
    names = yaml.safe_load(path.read_text())["names"]
    return [names[index] for index in range(len(names))]


def write_image(path: Path, width: int = 40, height: int = 30) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.zeros((height, width, 3), np.uint8))


def voc_object(name: str, *box: object, difficult: int = 0) -> str:
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox></object>"


def voc_xml(*objects: str, name: str = "a", size: str = "<width>40</width><height>30</height>") -> str:
    head = f"<filename>{name}.png</filename><size>{size}</size>"
    return f"<annotation>{head}{''.join(objects)}</annotation>"


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Train on a and b, validate on c; b has no object."""
    root = tmp_path / "voc"
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Main/train.txt").write_text("a\nb\n")
    (root / "ImageSets/Main/val.txt").write_text("c\n")
    for name in "abc":
        write_image(root / "JPEGImages" / f"{name}.png")
    (root / "Annotations/a.xml").write_text(
        voc_xml(voc_object("dog", 1, 1, 40, 30), voc_object("cat", 11, 11, 20, 20, difficult=1))
    )
    (root / "Annotations/b.xml").write_text(voc_xml(name="b"))
    (root / "Annotations/c.xml").write_text(
        voc_xml(voc_object("dog", 5, 5, 8, 8), voc_object("cat", 5, 5, 8, 8, difficult=1), name="c")
    )
    return root


def labels(out: Path, name: str) -> list[list[float]]:
    return [[float(v) for v in line.split()] for line in (out.parent / "labels" / name).read_text().splitlines()]


def test_voc_boxes_count_from_one(voc: Path) -> None:
    out = prepare_data(voc)
    assert class_names(out) == ["cat", "dog"]
    # 1..40 of 40 columns is the whole width; 11..20 is the ten columns from edge 10 to edge 20.
    expected = [[1, 0.5, 0.5, 1, 1], [0, 15 / 40, 15 / 30, 10 / 40, 10 / 30]]
    np.testing.assert_allclose(labels(out, "train/a.txt"), expected, atol=1e-6)
    assert labels(out, "train/b.txt") == []


def test_voc_difficult_objects_are_trained_on_but_not_validated_on(voc: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "gid_yolo"):
        out = prepare_data(voc)
    assert len(labels(out, "train/a.txt")) == 2
    assert [row[0] for row in labels(out, "val/c.txt")] == [1]
    assert "2 train, 1 val images, 2 boxes in train, 2 classes; left out: 1 difficult (val, test)" in caplog.text


def test_boxes_are_clipped_and_dropped_outside(voc: Path) -> None:
    boxes = [voc_object("dog", -9, 11, 20, 99), voc_object("dog", 41, 1, 60, 9), voc_object("dog", 9, 9, 5, 20)]
    (voc / "Annotations/a.xml").write_text(voc_xml(*boxes))
    out = prepare_data(voc)
    expected = [[class_names(out).index("dog"), 10 / 40, 20 / 30, 20 / 40, 20 / 30]]
    np.testing.assert_allclose(labels(out, "train/a.txt"), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("lists", "train", "val"), [(("trainval", "test"), "trainval", "test"), (("train", "test"), "train", "test")]
)
def test_voc_lists_that_stand_in(voc: Path, lists: tuple[str, str], train: str, val: str) -> None:
    folder = voc / "ImageSets/Main"
    for path in folder.iterdir():
        path.unlink()
    (folder / f"{lists[0]}.txt").write_text("a\n")
    (folder / f"{lists[1]}.txt").write_text("c\n")
    out = prepare_data(voc)
    assert sorted(p.name for p in (out.parent / "labels/train").iterdir()) == ["a.txt"]
    assert sorted(p.name for p in (out.parent / "labels/val").iterdir()) == ["c.txt"]


def test_voc_images_are_told_from_masks_and_read_for_a_missing_size(voc: Path) -> None:
    write_image(voc / "SegmentationClass/a.png")
    (voc / "Annotations/a.xml").write_text(voc_xml(voc_object("dog", 1, 1, 20, 15), size="<width>0</width>"))
    out = prepare_data(voc)
    assert (out.parent / "images/train/a.png").resolve() == (voc / "JPEGImages/a.png").resolve()
    assert labels(out, "train/a.txt")[0][1:] == [0.25, 0.25, 0.5, 0.5]


def test_xml_in_another_encoding(voc: Path) -> None:
    text = '<?xml version="1.0" encoding="ISO-8859-1"?>' + voc_xml(voc_object("câble", 1, 1, 9, 9))
    (voc / "Annotations/a.xml").write_bytes(text.encode("latin-1"))
    assert "câble" in class_names(prepare_data(voc))


def test_a_name_listed_twice_is_one_image(voc: Path) -> None:
    (voc / "ImageSets/Main/train.txt").write_text("a\na\n")
    assert len(list((prepare_data(voc).parent / "images/train").iterdir())) == 1


def test_a_set_whose_images_moved_is_made_anew(voc: Path) -> None:
    first = prepare_data(voc)
    (voc / "JPEGImages").rename(voc / "pictures")
    second = prepare_data(voc)
    assert second != first
    assert (second.parent / "images/train/a.png").exists()


def test_a_conversion_is_reused_until_a_source_changes(voc: Path) -> None:
    first = prepare_data(voc)
    written = first.stat().st_mtime_ns
    assert prepare_data(str(voc)) == first
    assert first.stat().st_mtime_ns == written
    (voc / "Annotations/b.xml").write_text(voc_xml(voc_object("bird", 1, 1, 9, 9), name="b"))
    second = prepare_data(voc)
    assert second != first
    assert class_names(second) == ["bird", "cat", "dog"]


def test_an_interrupted_conversion_leaves_nothing(voc: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, link: Path) -> None:
        if source.stem == "c":
            raise KeyboardInterrupt
        link.touch()

    monkeypatch.setattr(convert, "_place", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare_data(voc)
    assert list((cache / "converted").iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("GID_CACHE", str(cache))
    assert prepare_data(voc).is_file()


def test_images_are_copied_where_links_fail(voc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    image = prepare_data(voc).parent / "images/train/a.png"
    assert not image.is_symlink()
    assert image.read_bytes() == (voc / "JPEGImages/a.png").read_bytes()


def test_an_ordinary_yaml_is_returned_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "train: [images/a, images/b]\nval: val.txt\nnames: [x]\n"
    (tmp_path / "own.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert prepare_data("own.yaml") == tmp_path / "own.yaml"
    assert (tmp_path / "own.yaml").read_text() == text


def coco_set(root: Path, edit: Callable[[dict[str, Any]], object] = lambda data: None, **extra: object) -> Path:
    """Two images (the second in a subfolder, without objects), ids with gaps, one box out of the frame, one crowd."""
    write_image(root / "pictures/a.png")
    write_image(root / "pictures/more/b.png")
    data: dict[str, Any] = {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 9, "file_name": "more/b.png", "width": 40, "height": 30},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 90, "bbox": [10, 15, 20, 15]},
            {"id": 2, "image_id": 7, "category_id": 3, "bbox": [30, 0, 50, 30]},
            {"id": 3, "image_id": 7, "category_id": 3, "bbox": [5, 5, 0, 9]},
            {"id": 4, "image_id": 7, "category_id": 3, "bbox": [0, 0, 40, 30], "iscrowd": 1},
        ],
        "categories": [{"id": 90, "name": "brush"}, {"id": 3, "name": "car"}],
    }
    edit(data)
    (root / "train.json").write_text(json.dumps(data))
    split = {"images": "pictures", "annotations": "train.json"}
    path = root / "set.yaml"
    path.write_text(yaml.safe_dump({"train": split, "val": split, **extra}))
    return path


def test_coco_ids_become_contiguous_and_boxes_are_clipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "gid_yolo"):
        out = prepare_data(coco_set(tmp_path))
    assert class_names(out) == ["car", "brush"]
    assert labels(out, "train/a.txt") == [[1, 0.5, 0.75, 0.5, 0.5], [0, 0.875, 0.5, 0.25, 1]]
    assert labels(out, "train/more/b.txt") == []
    assert (out.parent / "images/train/more/b.png").is_file()
    assert "2 boxes in train, 2 classes; left out: 2 iscrowd, 2 without area" in caplog.text  # train and val alike


def test_images_of_one_name_in_two_folders_stay_apart(tmp_path: Path) -> None:
    write_image(tmp_path / "pictures/more/a.png", 50, 50)
    out = prepare_data(coco_set(tmp_path, put("images.1.file_name", "more/a.png")))
    assert cv2.imread(str(out.parent / "images/train/a.png")).shape == (30, 40, 3)
    assert cv2.imread(str(out.parent / "images/train/more/a.png")).shape == (50, 50, 3)
    assert labels(out, "train/more/a.txt") == []


def test_paths_start_at_the_path_of_the_yaml(tmp_path: Path) -> None:
    coco_set(tmp_path / "below", path="below").rename(tmp_path / "set.yaml")
    assert class_names(prepare_data(tmp_path / "set.yaml")) == ["car", "brush"]


def test_names_of_the_yaml_decide_the_order(tmp_path: Path) -> None:
    out = prepare_data(coco_set(tmp_path, names={0: "brush", 1: "bus", 2: "car"}))
    assert class_names(out) == ["brush", "bus", "car"]
    assert [row[0] for row in labels(out, "train/a.txt")] == [0, 2]


# --- mistakes ----------------------------------------------------------------------------------------------------


def one_sentence(error: pytest.ExceptionInfo[UserError]) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert ": " in message  # what is wrong, where: what to do


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"set\.yaml does not exist: give the path of a data yaml"),
        ("train: [a\nval: b: c", r"set\.yaml is not a yaml file"),
        ("just words", "must hold 'key: value' lines"),
        ("val: images/val", "has no 'train:'"),
        ("train: images/train", "has no 'val:'"),
        ("train: {images: x}\nval: y", r"'train:' has no 'annotations:'"),
        ("train: {images: nowhere, annotations: a.json}\nval: y", "nowhere, which does not exist"),
        ("train: {images: ., annotations: a.json}\nval: .", r"a\.json, which does not exist"),
    ],
)
def test_wrong_yaml(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "set.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        prepare_data(path)
    one_sentence(error)


def test_neither_yaml_nor_voc(tmp_path: Path) -> None:
    (tmp_path / "data.zip").touch()
    with pytest.raises(UserError, match="is not a data yaml") as error:
        prepare_data(tmp_path / "data.zip")
    one_sentence(error)
    with pytest.raises(UserError, match=r"is a folder without Annotations/\*\.xml and ImageSets") as error:
        prepare_data(tmp_path)
    one_sentence(error)


BOMB = '<!DOCTYPE a [<!ENTITY x "yyyy"><!ENTITY z "&x;&x;">]><annotation>&z;</annotation>'


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("Annotations/a.xml", "<annotation><object>", r"a\.xml is not readable XML"),
        ("Annotations/a.xml", BOMB, r"a\.xml declares a DOCTYPE"),
        (
            "Annotations/a.xml",
            voc_xml(voc_object("dog", 1, "x", 3, 4)),
            r"a\.xml: object 1 has the box .*not four numbers",
        ),
        ("Annotations/a.xml", voc_xml(voc_object("dog", 1, "nan", 3, 4)), "not four numbers"),
        (
            "Annotations/a.xml",
            voc_xml(voc_object("dog", 1, 1, 2, 2), voc_object("", 1, 2, 3, 4)),
            "object 2 has no <name>",
        ),
        ("Annotations/a.xml", voc_xml("<object><name>dog</name></object>"), "object 1 has no <bndbox/xmin>"),
        ("Annotations/a.xml", voc_xml(), "the train split of .* has no boxes"),
        ("ImageSets/Main/train.txt", "a\nz\n", r"train\.txt lists 'z', but there is no .*z\.xml"),
        ("ImageSets/Main/train.txt", "../a\n", r"but there is no .*\.\./a\.xml"),
        ("JPEGImages/a.png", None, r"a\.xml: its image 'a\.png' is not below"),
        ("ImageSets/Main/val.txt", None, r"has no ImageSets/Main/val\.txt"),
        ("ImageSets/Main/train.txt", None, r"has no ImageSets/Main/train\.txt"),
    ],
)
def test_wrong_voc(voc: Path, cache: Path, file: str, text: str | None, message: str) -> None:
    if text is None:
        (voc / file).unlink()
    else:
        (voc / file).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        prepare_data(voc)
    one_sentence(error)
    assert not list(cache.glob("converted/*"))


def test_an_ambiguous_voc_image(voc: Path) -> None:
    write_image(voc / "JPEGImages/copy/a.png")
    (voc / "JPEGImages/a.png").rename(voc / "a.png")
    with pytest.raises(UserError, match=r"could be .* or ") as error:
        prepare_data(voc)
    one_sentence(error)


def put(path: str, value: object) -> Callable[[dict[str, Any]], object]:
    """Return an edit that sets an entry of the JSON ("annotations.0.bbox") or, with ..., removes it."""
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]

    def edit(data: Any) -> None:
        for key in parents:
            data = data[key]
        if value is ...:
            del data[last]
        else:
            data[last] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put("images", ...), r"train\.json has no list 'images'"),
        (put("annotations", {}), "has no list 'annotations'"),
        (put("categories", [1]), "has no list 'categories'"),
        (put("annotations.0.category_id", 4), r"annotation 1 \(id 1\) names the category 4"),
        (put("annotations.1.image_id", 8), r"annotation 2 \(id 2\) names the image 8"),
        (put("annotations.0.bbox", ...), r"annotation 1 \(id 1\) has no usable 'bbox'"),
        (put("annotations.0.bbox", [1, 2, 3]), "not four numbers"),
        (put("images.0.width", ...), "image 1 has no usable 'width'"),
        (put("images.1.id", 7), "image 2 repeats the id 7"),
        (put("images.0.height", 0), "impossible size"),
        (put("images.0.file_name", "gone.png"), r"image 1: 'gone\.png' is not below"),
        (put("images.0.file_name", "../train.json"), r"'\.\./train\.json' is not below"),
        (put("categories.1.name", "brush"), "category 2 repeats"),
        (put("annotations", []), "the train split of .* has no boxes"),
    ],
)
def test_wrong_coco(tmp_path: Path, cache: Path, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    path = coco_set(tmp_path, edit)
    with pytest.raises(UserError, match=message) as error:
        prepare_data(path)
    one_sentence(error)
    assert not list(cache.glob("converted/*"))


def test_wrong_json_and_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has the category 'car', which 'names:' of") as error:
        prepare_data(coco_set(tmp_path, names=["brush"]))
    one_sentence(error)
    path = coco_set(tmp_path)
    (tmp_path / "train.json").write_text('{"images": [')
    with pytest.raises(UserError, match=r"train\.json is not a JSON file") as error:
        prepare_data(path)
    one_sentence(error)


def test_images_that_share_a_label_file(tmp_path: Path) -> None:
    write_image(tmp_path / "pictures/a.jpg")
    with pytest.raises(UserError, match="would share a label file") as error:
        prepare_data(coco_set(tmp_path, put("images.1.file_name", "a.jpg")))
    one_sentence(error)


def test_a_yaml_that_is_a_link_is_read_from_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "yamls").mkdir()
    (tmp_path / "yamls" / "real.yaml").write_text("train: images/train\nval: images/val\nnames: [a]\n")
    (tmp_path / "set").mkdir()
    link = tmp_path / "set" / "data.yaml"
    link.symlink_to(tmp_path / "yamls" / "real.yaml")
    assert prepare_data(link) == link


def test_validation_is_another_word_for_val(tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    path.write_text("train: images/train\nvalidation: images/val\nnames: [a]\n")
    assert prepare_data(path) == path
    path = coco_set(tmp_path)
    contents = yaml.safe_load(path.read_text())
    contents["validation"] = contents.pop("val")
    path.write_text(yaml.safe_dump(contents))
    assert "val" in yaml.safe_load(prepare_data(path).read_text())
