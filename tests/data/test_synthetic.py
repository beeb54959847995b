"""The synthetic set: the same for everyone, labelled tightly, in all of COCO's area ranges, and whole or absent."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from gid_yolo.data import cache_dir, synthetic, synthetic_dataset
from gid_yolo.data.cache import write_once
from gid_yolo.data.scene import MAX_OBJECTS
from gid_yolo.data.shapes import CLASSES, coverage, place, unit_outline
from gid_yolo.errors import UserError

COUNTS = {"train": 12, "val": 4, "test": 3}
SIZE = synthetic.IMAGE_SIZE


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_dataset(tmp_path_factory.mktemp("data") / "set", counts=COUNTS).parent


def read_labels(path: Path) -> np.ndarray:
    return np.array([line.split() for line in path.read_text().splitlines()], float).reshape(-1, 5)


def content_hash(root: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(root.glob("labels/*/*.txt")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    for path in sorted(root.glob("images/*/*"))[::4]:
        digest.update(cv2.imread(str(path)).tobytes())
    return digest.hexdigest()


def test_layout_is_ultralytics(dataset: Path) -> None:
    data = yaml.safe_load((dataset / "data.yaml").read_text())
    assert data.pop("names") == dict(enumerate(CLASSES))
    assert data == {split: f"images/{split}" for split in COUNTS}
    for split, count in COUNTS.items():
        images, labels = sorted((dataset / "images" / split).iterdir()), sorted((dataset / "labels" / split).iterdir())
        assert [p.stem for p in images] == [p.stem for p in labels]
        assert len(images) == count
        assert cv2.imread(str(images[0])).shape == (SIZE, SIZE, 3)


def test_two_writes_agree(dataset: Path, tmp_path: Path) -> None:
    again = synthetic_dataset(tmp_path / "again", counts=COUNTS).parent
    assert content_hash(again) == content_hash(dataset)


def test_images_differ_between_and_within_splits() -> None:
    images = [synthetic.draw(split, index).image.tobytes() for split in COUNTS for index in range(3)]
    assert len(set(images)) == len(images)


def test_labels_are_the_boxes_of_the_masks() -> None:
    """Each box is that of the pixels its object covers in the frame, within 1 px, also where the border cuts it."""
    inside, cut = 0, 0
    for index in range(40):
        scene = synthetic.draw("train", index)
        for box, mask in zip(scene.boxes, scene.masks, strict=True):
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            drawn = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            outside = np.array([*(box - drawn)[:2], *(drawn - box)[2:]])
            assert np.abs(outside).max() <= 1
            at_border = box.min() <= 0 or box.max() >= SIZE
            inside, cut = inside + (not at_border), cut + at_border
    assert inside > 100
    assert cut > 30


@pytest.mark.parametrize("kind", CLASSES)
def test_an_outline_fills_the_box_it_is_placed_in(kind: str) -> None:
    rng = np.random.default_rng(0)
    for side in (8.0, 31.3, 140.0):
        outline = place(unit_outline(kind, rng), np.array([80.2, 79.6]), side, rng.uniform(0, 6.28), 0.8)
        share = coverage(outline, (0, 0), (SIZE, SIZE))
        rows, columns = np.flatnonzero(share.any(axis=1)), np.flatnonzero(share.any(axis=0))
        points = outline[0]
        drawn = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        np.testing.assert_allclose(drawn, [*points.min(axis=0), *points.max(axis=0)], atol=1.0)
        assert np.ptp(points, axis=0).max() == pytest.approx(side)
        area = sum(cv2.contourArea(c.astype(np.float32)) * (1 if i == 0 else -1) for i, c in enumerate(outline))
        # The rasteriser includes edge pixels: an excess that shrinks with the side.
        assert share.sum() == pytest.approx(area, rel=1.5 / side + 0.01)


def test_labels_on_disk_are_the_scenes(dataset: Path) -> None:
    for index in range(COUNTS["train"]):
        scene = synthetic.draw("train", index)
        rows = read_labels(dataset / "labels/train" / f"{index:05d}.txt")
        corners = np.concatenate([rows[:, 1:3] - rows[:, 3:] / 2, rows[:, 1:3] + rows[:, 3:] / 2], axis=1) * SIZE
        np.testing.assert_array_equal(rows[:, 0], scene.classes)
        np.testing.assert_allclose(corners, scene.boxes, atol=1e-3)


def test_spread_of_objects() -> None:
    """COCO's area ranges fall in number, all classes are there, and so are images without an object."""
    scenes = [synthetic.draw("train", index) for index in range(200)]
    boxes = np.concatenate([s.boxes for s in scenes])
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    small, medium, large = (area < 32**2).sum(), ((area >= 32**2) & (area <= 96**2)).sum(), (area > 96**2).sum()
    assert small > medium > large > 0.04 * len(area)
    per_class = np.bincount(np.concatenate([s.classes for s in scenes]), minlength=len(CLASSES))
    assert per_class.min() > 0.6 * per_class.max()
    assert 0 < sum(len(s.boxes) == 0 for s in scenes) <= 12
    assert max(len(s.boxes) for s in scenes) <= MAX_OBJECTS
    assert boxes.min() >= 0
    assert boxes.max() <= SIZE


def test_an_image_without_objects_has_an_empty_label_file(tmp_path: Path) -> None:
    empty = next(index for index in range(500) if len(synthetic.draw("val", index).boxes) == 0)
    counts = {"train": 1, "val": empty + 1}
    root = synthetic_dataset(tmp_path / "set", counts=counts).parent
    assert (root / "labels/val" / f"{empty:05d}.txt").read_text() == ""


def test_default_place_is_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GID_CACHE", str(tmp_path))
    first = synthetic_dataset(image_size=64, counts={"train": 2, "val": 1})
    assert first.is_relative_to(tmp_path)
    assert synthetic_dataset(image_size=64, counts={"train": 3, "val": 1}) != first
    time = first.stat().st_mtime_ns
    assert synthetic_dataset(image_size=64, counts={"train": 2, "val": 1}) == first
    assert first.stat().st_mtime_ns == time


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("GID_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("GID_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "gid_yolo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "gid_yolo"


def test_an_interrupted_write_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn = synthetic.draw

    def interrupted(split: str, index: int, image_size: int = SIZE) -> object:
        if split == "val":
            raise KeyboardInterrupt
        return drawn(split, index, image_size)

    monkeypatch.setattr(synthetic, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        synthetic_dataset(tmp_path / "set", counts=COUNTS)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(synthetic, "draw", drawn)
    assert synthetic_dataset(tmp_path / "set", counts=COUNTS).is_file()


def test_concurrent_writers_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: synthetic_dataset(tmp_path / "set", counts={"train": 3, "val": 2}), range(4)))
    assert set(paths) == {tmp_path / "set" / "data.yaml"}
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_foreign_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").touch()
    with pytest.raises(UserError, match=r"is in the way and has no data\.yaml"):
        write_once(tmp_path / "set", lambda folder: (folder / "data.yaml").touch())
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_cache_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="set GID_CACHE"):
        synthetic_dataset(tmp_path / "file" / "set")
