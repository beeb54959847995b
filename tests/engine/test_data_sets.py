"""Data sets come from anywhere: nothing in them is run, and nothing is written beside them."""

import os
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from engine_helpers import FAST
from ultralytics.data import dataset

from gid_yolo import GID
from gid_yolo.engine.label_cache import own_label_caches, place_of
from gid_yolo.engine.named_data import check_program
from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.errors import UserError
from gid_yolo.export.evaluate import open_split, read_data

PROGRAM = "import os\nos.makedirs('ran')"


class Payload:
    def __reduce__(self):
        return os.makedirs, ("ran",)


@pytest.fixture
def own(data, tmp_path) -> Path:
    """A data set of this test."""
    shutil.copytree(data.parent, tmp_path / "own")
    file = tmp_path / "own" / data.name
    contents = yaml.safe_load(data.read_text())
    file.write_text(yaml.safe_dump({**contents, "path": str(file.parent)}))
    return file


def changed(file: Path, **values) -> Path:
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **values}))
    return file


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


WAYS = {
    "train": lambda file, teacher: GID("retina_nano").train(data=str(file), **FAST),
    "trainer": lambda file, teacher: GIDTrainer(overrides={**FAST, "model": "retina_nano", "data": str(file)}).train(),
    "val": lambda file, teacher: GID(teacher).val(data=str(file), imgsz=64),
    "int8": lambda file, teacher: GID("retina_nano").export(data=str(file), imgsz=64, quantize=8),
}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_written_beside_the_images(own, teacher, way):
    before = everything(own.parent)
    WAYS[way](own, teacher)
    assert everything(own.parent) == before


def as_jpeg(file: Path, tail: bytes = b"", cut: int | None = None) -> Path:
    """The first training image as a JPEG, with bytes behind its end, or cut off."""
    image = file.parent / "images" / "train" / "0.png"
    encoded = cv2.imencode(".jpg", cv2.imread(str(image)))[1].tobytes()
    image.unlink()
    image.with_suffix(".jpg").write_bytes(encoded[:cut] + tail)
    return image.with_suffix(".jpg")


@pytest.mark.parametrize("way", ["train", "int8"])
def test_a_jpeg_with_bytes_behind_its_end_is_used_as_it_is(own, teacher, way):
    as_jpeg(own, tail=b"x")
    before = everything(own.parent)
    WAYS[way](own, teacher)
    assert everything(own.parent) == before


def test_a_jpeg_that_is_cut_off_is_left_out_as_it_is(own, monkeypatch):
    image, said = as_jpeg(own, cut=-300), []
    monkeypatch.setattr("gid_yolo.engine.unusable.LOGGER.warning", said.append)
    before = everything(own.parent)
    WAYS["trainer"](own, None)
    assert everything(own.parent) == before
    assert f"images left out: 1\n{image}: the image cannot be read (" in said[0]


def test_what_is_no_file_is_left_out(own, monkeypatch):
    pipe, label = own.parent / "images" / "train" / "pipe.png", own.parent / "labels" / "train" / "0.txt"
    label.unlink()
    said = []
    monkeypatch.setattr("gid_yolo.engine.unusable.LOGGER.warning", said.append)
    for path in (pipe, label):
        os.mkfifo(path)  # whoever opens it waits
    WAYS["trainer"](own, None)
    assert f"{pipe}: the image cannot be read (it is no file)" in said[0]
    assert f"{label}: it is no file, so it holds no labels" in said[0]


def test_a_name_that_moves_a_terminal_is_printed_without(own, monkeypatch):
    said = []
    monkeypatch.setattr("gid_yolo.engine.unusable.LOGGER.warning", said.append)
    (own.parent / "images" / "train" / "a\x1b[31m\nb.png").write_bytes(b"")
    WAYS["trainer"](own, None)
    assert "a?[31m b.png: the image cannot be read" in said[0]


@pytest.mark.parametrize("way", WAYS)
def test_more_classes_than_can_be_are_refused(own, teacher, way):
    with pytest.raises(UserError, match="has nc: 100000000, more classes than the 100000 that are taken"):
        WAYS[way](changed(own, nc=10**8, names=None), teacher)


@pytest.mark.parametrize("way", WAYS)
def test_a_cache_that_comes_with_the_data_is_not_opened(own, teacher, way):
    for split in ("train", "val"):
        with (own.parent / "labels" / f"{split}.cache").open("wb") as file:
            np.save(file, np.array(Payload(), dtype=object))
    with (own.parent / "labels" / "val.cache").open("rb") as file:
        np.load(file, allow_pickle=True)  # it would
    assert Path("ran").is_dir()
    Path("ran").rmdir()
    WAYS[way](own, teacher)
    assert not Path("ran").exists()


def test_labels_are_read_once_and_again_where_they_have_changed(own, monkeypatch):
    scans = []
    scan = dataset.YOLODataset.cache_labels
    monkeypatch.setattr(dataset.YOLODataset, "cache_labels", lambda self, path: scans.append(path) or scan(self, path))

    def classes() -> set[float]:
        """The validation set's, as a benchmark reads them."""
        path, contents = read_data(own, "val")
        labels = open_split(path, contents, split="val", imgsz=[64, 64], batch=2).dataset.labels
        return {float(c) for label in labels for c in label["cls"].ravel()}

    assert classes() == classes() == {0.0, 1.0}
    assert len(scans) == 1
    assert place_of(own.parent / "labels" / "val.cache").is_file()
    for file in (own.parent / "labels" / "val").iterdir():  # of the same size
        file.write_text(re.sub("^1", "0", file.read_text(), flags=re.M))
    assert classes() == {0.0}
    assert len(scans) == 2


def test_two_folders_of_one_name_have_two_caches(tmp_path):
    assert place_of(tmp_path / "a" / "train.cache") != place_of(tmp_path / "b" / "train.cache")
    assert place_of(Path("a") / "train.cache") == place_of(tmp_path / "a" / "train.cache")  # we are in tmp_path


def test_a_cache_that_cannot_be_written_is_done_without(own, teacher, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GID_CACHE", str(tmp_path / "file"))
    GID(teacher).val(data=str(own), imgsz=64)
    assert (tmp_path / "file").read_text() == ""


def test_other_data_sets_are_ultralytics_own_matter():
    before = dataset.load_dataset_cache_file, dataset.save_dataset_cache_file

    def fail() -> None:
        with own_label_caches():
            assert dataset.load_dataset_cache_file is not before[0]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (dataset.load_dataset_cache_file, dataset.save_dataset_cache_file) == before


@pytest.mark.parametrize("program", [PROGRAM, "bash ran.sh", "https://example.com/not-an-archive"])
@pytest.mark.parametrize("way", WAYS)
def test_a_program_of_a_data_yaml_is_not_run(own, teacher, way, program):
    Path("ran.sh").write_text("mkdir ran")
    split = "train" if way == "int8" else "val"
    changed(own, download=program, **{split: "images/gone"})
    with pytest.raises(UserError, match=rf"images of its {split} split are missing, and its download: is a program"):
        WAYS[way](own, teacher)
    assert not Path("ran").exists()


def test_it_is_run_where_it_is_trusted(own):
    """The sentence says so; the images are still missing after it."""
    changed(own, download=PROGRAM, val="images/gone")
    with pytest.raises(Exception, match="gone"):
        GID("retina_nano", trust=True).train(data=str(own), **FAST)
    assert Path("ran").is_dir()


def test_a_program_that_is_not_needed_is_no_fault(own):
    changed(own, download=PROGRAM)
    WAYS["trainer"](own, None)
    assert not Path("ran").exists()


def test_archives_and_what_ultralytics_ships_are_left_to_it(own):
    check_program(changed(own, download="https://example.com/a.zip?x=1", val="images/gone"), "val")
    check_program("VOC.yaml", "val")  # its program is long
    check_program("none-such.yaml", "val")
