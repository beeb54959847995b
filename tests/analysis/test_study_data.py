"""A study's runs are compared on the same data, or not at all."""

import json
from pathlib import Path

import pytest

from gid_yolo.analysis.study_data import SameData
from gid_yolo.analysis.study_plan import Run
from gid_yolo.errors import UserError


def noted(folder: Path, name: str, train: str = "t", val: str = "v", **args) -> Run:
    (folder / name).mkdir()
    data = {split: {"images": 1, "digest": digest} for split, digest in (("train", train), ("val", val))}
    (folder / name / "run.json").write_text(json.dumps({"starts": [{"data": {}}, {"data": data}]}))
    return Run(name, {"data": "a.yaml", **args})


def test_runs_of_the_same_data_pass(tmp_path) -> None:
    same = SameData(tmp_path)
    assert same.check(noted(tmp_path, "a"))
    assert same.check(noted(tmp_path, "b"))
    assert not same.check(Run("not there", {"data": "a.yaml"}))
    (tmp_path / "a" / "run.json").write_text("{")  # damaged
    assert not same.check(Run("a", {"data": "a.yaml"}))


@pytest.mark.parametrize("split", ["train", "val"])
def test_runs_of_other_data_are_refused(tmp_path, split: str) -> None:
    same = SameData(tmp_path)
    same.check(noted(tmp_path, "a"))
    with pytest.raises(UserError, match=rf"b and a beside it were trained on other {split} images, boxes or classes"):
        same.check(noted(tmp_path, "b", **{split: "other"}))


@pytest.mark.parametrize("args", [{"fraction": 0.5}, {"classes": [0]}, {"single_cls": True}, {"data": "b.yaml"}])
def test_rows_may_differ_in_what_they_see(tmp_path, args) -> None:
    same = SameData(tmp_path)
    same.check(noted(tmp_path, "a"))
    assert same.check(noted(tmp_path, "b", "other", "other", **args))


def test_a_start_that_noted_nothing_yet_is_not_judged_by_the_one_before(tmp_path) -> None:
    same = SameData(tmp_path)
    same.check(noted(tmp_path, "a"))
    old = noted(tmp_path, "b", "of before")
    assert same.starts(old) == 2
    assert not same.check(old, after=2)
    file = tmp_path / "b" / "run.json"
    starts = json.loads(file.read_text())["starts"]
    data = {split: {"images": 1, "digest": digest} for split, digest in (("train", "t"), ("val", "v"))}
    file.write_text(json.dumps({"starts": [*starts, {"data": data}]}))
    assert same.check(old, after=2)


def test_rectangles_come_in_another_order(tmp_path) -> None:
    same = SameData(tmp_path)
    same.check(noted(tmp_path, "a"))
    same.check(noted(tmp_path, "b", "other order", rect=True))  # Ultralytics sorts images by their aspect ratio
    with pytest.raises(UserError, match="val images"):
        same.check(noted(tmp_path, "c", "other order", "other", rect=True))


def test_of_runs_that_noted_it_the_order_does_not_count(tmp_path) -> None:
    same = SameData(tmp_path)
    for name, order, contents in (("a", "1", "c"), ("b", "2", "c"), ("c", "1", "other")):
        run = noted(tmp_path, name, order, order)
        file = tmp_path / name / "run.json"
        starts = json.loads(file.read_text())
        for split in ("train", "val"):
            starts["starts"][-1]["data"][split]["contents"] = contents
        file.write_text(json.dumps(starts))
        if name == "c":
            with pytest.raises(UserError, match="c and a beside it"):
                same.check(run)
        else:
            assert same.check(run)


def test_a_run_that_did_not_note_it_is_compared_in_its_order(tmp_path) -> None:
    same = SameData(tmp_path)
    same.check(noted(tmp_path, "old"))
    for name, order in (("new", "t"), ("other", "changed")):
        run = noted(tmp_path, name, order)
        file = tmp_path / name / "run.json"
        starts = json.loads(file.read_text())
        starts["starts"][-1]["data"]["train"]["contents"] = "c"
        file.write_text(json.dumps(starts))
        if name == "new":
            assert same.check(run)
        else:
            with pytest.raises(UserError, match="other and old beside it were trained on other train"):
                same.check(run)
