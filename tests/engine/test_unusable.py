"""What is said of images that are left out, against which ones Ultralytics leaves out, of whole data sets."""

import random
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ultralytics.data.dataset import YOLODataset
from ultralytics.utils import LOGGER

from gid_yolo.engine.unusable import reading, tell_unusable
from gid_yolo.errors import UserError

PICTURE = cv2.imencode(".png", np.zeros((20, 20, 3), np.uint8))[1].tobytes()
IMAGES = st.one_of(st.just(PICTURE), st.sampled_from([b"", b"<html>", PICTURE[:40], PICTURE[:-20]]))
LABELS = st.sampled_from(
    [None, "", "0 0.5 0.5 0.2 0.2\n", "1 .1 .1 .1 .1", "7 .1 .1 .1 .1", "0 nan 0 0 0", "a", "0 0.5 0.5 0.2", "\x00"]
)
NAMES = st.sampled_from(
    ["a.png", ".hidden.png", "b c.PNG", "d.e.png", "sub/a.png", "linked/a.png", "f.txt", "\u00e9.png"]
)


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """Our warnings alone: a line of Ultralytics' has its own prefix, or is of its whole data set."""
    lines: list[str] = []

    def keep(text, *args, **kwargs):
        if str(text).startswith("images "):
            lines.extend(str(text).splitlines())

    monkeypatch.setattr(LOGGER, "warning", keep)
    return lines


def opened(folder: Path, images: Path | None = None, **arguments) -> YOLODataset:
    with reading(folder, "train"):
        return YOLODataset(
            str(images or folder / "images"), data={"names": {0: "x", 1: "y"}, "channels": 3}, imgsz=32, **arguments
        )


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(files=st.dictionaries(NAMES, st.tuples(IMAGES, LABELS), max_size=6), single=st.booleans())
def test_what_is_left_out_is_said_of_each(tmp_path, said, files, single):
    for old in tmp_path.iterdir():
        shutil.rmtree(old)
    said.clear()
    folder = tmp_path / f"{random.random()}"  # labels are cached by their place
    (folder / "other").mkdir(parents=True)
    (folder / "images").mkdir()
    (folder / "images" / "linked").symlink_to(folder / "other")
    for name, (image, label) in files.items():
        for path, contents in ((folder / "images" / name, image), (folder / "labels" / f"{name[:-4]}.txt", label)):
            path.parent.mkdir(parents=True, exist_ok=True)
            if contents is not None:
                path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    try:
        dataset = opened(folder, single_cls=single)
    except UserError:
        return
    # What Ultralytics looks for: an image's suffix, and no hidden name; by hand
    wanted = {str(folder / "images" / name) for name in files if name[-3:].lower() == "png" and name[0] != "."}
    left = wanted - set(dataset.im_files)
    assert tell_unusable(dataset, None if single else 2) == len(left)
    assert said[:1] == [f"images left out: {len(left)}"] * bool(left)
    for image in left:
        label = image.replace("/images/", "/labels/")[:-4] + ".txt"
        assert any(line.startswith((f"{image}: ", f"{label}:")) for line in said), (image, said)


def write(folder: Path, count: int = 3) -> None:
    for kind, contents in (("images", PICTURE), ("labels", b"0 0.5 0.5 0.2 0.2\n")):
        (folder / kind).mkdir(parents=True)
        for i in range(count):
            (folder / kind / f"{i}.{'png' if kind == 'images' else 'txt'}").write_bytes(contents)


def test_a_list_with_blanks_and_a_mark_is_read_as_ultralytics_reads_it(tmp_path, said):
    write(tmp_path)
    (tmp_path / "images" / "with blank.png").write_bytes(PICTURE)
    names = ["./images/0.png", "./images/with blank.png", "./images/1.png"]
    (tmp_path / "list.txt").write_text("\ufeff" + "\n".join(names) + "\n", encoding="utf-8")
    dataset = opened(tmp_path, tmp_path / "list.txt")
    assert len(dataset.im_files) == 3
    assert tell_unusable(dataset, 2) == 0
    assert said == []


def test_of_a_fraction_what_is_left_out_is_said(tmp_path, said):
    write(tmp_path, 4)
    (tmp_path / "images" / "0.png").write_bytes(b"no image")
    dataset = opened(tmp_path, fraction=0.5)  # the first 2 of 4
    assert tell_unusable(dataset, 2) == 1
    assert said[0] == "images left out: 1"
    assert said[1].startswith(f"{tmp_path}/images/0.png: the image cannot be read (cannot identify image file")


def test_the_reason_of_an_image_is_its_own(tmp_path, said):
    write(tmp_path)
    tiny = cv2.imencode(".png", np.zeros((5, 30, 3), np.uint8))[1].tobytes()
    (tmp_path / "images" / "0.png").write_bytes(tiny)
    assert tell_unusable(opened(tmp_path), 2) == 1
    assert said[1] == f"{tmp_path}/images/0.png: the image cannot be read (image size (5, 30) <10 pixels)"


def test_a_label_file_that_is_not_found_is_no_empty_one(tmp_path, said):
    write(tmp_path, 5)
    labels = tmp_path / "labels"
    for i in range(4):
        (labels / f"{i}.txt").unlink()
    (labels / "0.txt").mkdir()
    (labels / "1.txt").symlink_to(tmp_path / "none")
    (labels / "2.TXT").write_text("0 0.5 0.5 0.2 0.2\n")
    assert tell_unusable(opened(tmp_path), 2) == 0  # 3.png has none, and is a background
    assert said == [
        "images used as if they showed no object: 3",
        f"{labels / '0.txt'}: it is a folder, so it holds no labels",
        f"{labels / '1.txt'}: it is a link to nothing, so it holds no labels",
        f"{labels / '2.TXT'}: it must be called 2.txt to be read",
    ]


def test_many_are_counted(tmp_path, said):
    write(tmp_path, 30)
    for i in range(25):
        (tmp_path / "images" / f"{i}.png").write_bytes(b"")
    assert tell_unusable(opened(tmp_path), 2) == 25
    assert len(said) == 1 + 20 + 1
    assert said[-1] == "... and 5 more"
