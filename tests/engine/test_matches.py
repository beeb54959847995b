"""Which detections were right: collected, kept in a file, and written by a validation."""

import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from coco_helpers import crowded_images

from gid_yolo import GID
from gid_yolo.engine import coco_eval, validator
from gid_yolo.engine.coco_eval import CocoAccumulator
from gid_yolo.engine.matches import FILE, Matches, collected, read_matches, write_matches

FIELDS = tuple(Matches.__dataclass_fields__)


def filled(images, **kwargs) -> CocoAccumulator:
    accumulator = CocoAccumulator(4, **kwargs)
    for i, image in enumerate(images):
        accumulator.add(*image, name=f"é {i}.png")
    return accumulator


def same(one: Matches, other: Matches) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


def test_an_object_that_is_found_twice_and_one_that_is_missed():
    box, far = [10.0, 10, 60, 60], [100.0, 100, 160, 160]
    half = [10.0, 10, 60, 44]  # IoU 34 / 50 = 0.68, right at 0.5 to 0.65
    accumulator = CocoAccumulator(3)
    accumulator.add(np.zeros((0, 4)), np.zeros(0), np.array([far]), np.array([0.7]), np.array([2]), name="a")
    found = np.array([box, box, half]), np.array([0.5, 0.9, 0.8]), np.array([2, 2, 1])
    accumulator.add(np.array([box, box, far]), np.array([2, 1, 1]), *found, name="b")
    found = accumulator.matches()
    assert found.names.tolist() == ["a", "b"]
    assert found.classes.tolist() == [1, 2, 2, 2]  # then by score: 0.8; 0.9, 0.7, 0.5
    assert found.images.tolist() == [1, 1, 0, 1]
    assert found.matched.T.tolist() == [[True] * 4 + [False] * 6, [True] * 10, [False] * 10, [False] * 10]
    assert (found.object_classes.tolist(), found.object_images.tolist()) == ([1, 1, 2], [1, 1, 1])


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_what_a_process_evaluates_beside_is_the_same(monkeypatch, chunk):
    images = list(crowded_images(np.random.default_rng(0), 14, 3, 8, 20))
    whole = filled(images)
    monkeypatch.setattr(coco_eval, "CHUNK", chunk)
    beside = filled(images, beside=True)
    assert same(beside.matches(), whole.matches())
    assert beside.columns() == whole.columns()


def test_both_share_one_evaluation_until_an_image_is_added(monkeypatch):
    calls, evaluate = [], coco_eval.evaluate
    monkeypatch.setattr(coco_eval, "evaluate", lambda *args: (calls.append(1), evaluate(*args))[1])
    images = list(crowded_images(np.random.default_rng(1), 6, 3, 8, 20))
    accumulator = filled(images[:5])
    assert accumulator.columns() == accumulator.columns()
    accumulator.matches()
    assert len(calls) == 1
    accumulator.add(*images[5], name="é 5.png")
    assert same(accumulator.matches(), filled(images).matches())


def test_names_travel_with_the_images_of_other_processes():
    images = list(crowded_images(np.random.default_rng(2), 7, 3, 8, 20))
    parts = [CocoAccumulator(4), CocoAccumulator(4)]
    for i, image in enumerate(images):
        parts[i // 4].add(*image, name=f"é {i}.png")
    merged = CocoAccumulator.merged([pickle.loads(pickle.dumps(part)) for part in parts])
    assert same(merged.matches(), filled(images).matches())


@pytest.mark.parametrize(("count", "detections"), [(14, 20), (5, 0), (0, 0)])
def test_a_file_holds_what_was_written(tmp_path, count, detections):
    matches = filled(crowded_images(np.random.default_rng(3), count, 3, 8, detections)).matches()
    write_matches(matches, tmp_path / FILE)
    assert same(read_matches(tmp_path / FILE), matches)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_damaged_file_or_another_under_its_name_is_none(tmp_path):
    path = tmp_path / FILE
    matches = filled(crowded_images(np.random.default_rng(3), 14, 3, 8, 20)).matches()
    write_matches(matches, path)
    good = path.read_bytes()
    middle = len(good) // 2
    for data in (b"", b"PK", good[:middle], good[:-1], good[:60] + bytes(40) + good[100:], pickle.dumps([1])):
        path.write_bytes(data)
        assert read_matches(path) is None
    arrays = {name: getattr(matches, name) for name in FIELDS} | {"matched": np.packbits(matches.matched, axis=1)}
    wrong = [
        {"images": matches.images + len(matches.names)},
        {"images": matches.images - 1},
        {"images": matches.images * 0.5},
        {"images": matches.images[1:]},
        {"classes": matches.classes[:-9]},
        {"object_images": matches.object_images[1:]},
        {"matched": arrays["matched"].astype(float)},
        {"matched": arrays["matched"][0]},
        {"names": np.array("a")},
        {"names": np.array([{}] * len(matches.names), dtype=object)},  # a pickle, which is not opened
    ]
    for part in wrong:
        np.savez(path, **{**arrays, **part})
        assert read_matches(path) is None, part.keys()
    np.savez(path, **{name: x for name, x in arrays.items() if name != "names"})
    assert read_matches(path) is None
    with path.open("wb") as file:
        np.save(file, arrays["images"])
    assert read_matches(path) is None
    path.unlink()
    assert read_matches(path) is None
    np.savez(path, **arrays)
    assert same(read_matches(path), matches)


def test_a_validation_writes_the_file_before_its_results(teacher, data, tmp_path, monkeypatch):
    model = GID(teacher)
    monkeypatch.chdir(tmp_path)
    model.val(data=str(data), imgsz=64, conf=0.001, plots=False)
    (file,) = tmp_path.rglob(FILE)
    results = file.with_name("coco_metrics.json")
    matches = read_matches(file)
    assert sorted(matches.names) == sorted(path.name for path in (data.parent / "images" / "val").iterdir())
    assert len(matches.object_classes) == 4  # one in each image
    numbers = [int(Path(name).stem) for name in matches.names[matches.object_images]]
    assert matches.object_classes.tolist() == [number % 2 for number in numbers]  # as `write_data` labels them
    assert json.loads(results.read_text())["images"] == len(matches.names)
    shutil.rmtree(file.parent)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(validator, "write_matches", full)
    with pytest.raises(OSError, match="No space left"):
        model.val(data=str(data), imgsz=64, conf=0.001, plots=False)
    assert list(tmp_path.rglob("coco_metrics.json")) == []


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["/a/val/1.png", "/a/val/2.png"], ["1.png", "2.png"]),
        (["/a/val/1.png", "/a/more/val/1.png"], ["val/1.png", "more/val/1.png"]),
        (["1.png", "b/1.png"], ["1.png", "b/1.png"]),
        (["/a/1.png"], ["1.png"]),
        ([], []),
    ],
)
def test_names_are_without_the_folder_of_all(files, names):
    assert collected([], files, 10).names.tolist() == names
