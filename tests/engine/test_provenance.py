"""Digests of what a run saw."""

import hashlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import ultralytics
import yaml
from engine_helpers import FAST, Interrupted, train_one_epoch, write_data
from ultralytics.utils import LOGGER

from gid_yolo.cli import main
from gid_yolo.engine.checkpoint import fingerprint, load_model
from gid_yolo.engine.provenance import (
    changed_since,
    check_goes_on,
    commit_of,
    data_of,
    digest_of_file,
    digest_of_labels,
    same_images,
    split_of,
)
from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.errors import UserError

NAMES = {0: "cat", 1: "dog"}


def labels(root, boxes=((0.5, 0.5, 0.2, 0.1),), classes=(1,), files=("a/1.jpg", "b/1.jpg")):
    return [
        {
            "im_file": f"{root}/{file}",
            "cls": np.array(classes, np.float32).reshape(-1, 1),
            "bboxes": np.array(boxes, np.float32).reshape(-1, 4),
        }
        for file in files
    ]


def test_a_copy_elsewhere_is_the_same():
    assert digest_of_labels(labels("/one"), NAMES) == digest_of_labels(labels("/some/other"), NAMES)


@pytest.mark.parametrize(
    "other",
    [
        {"classes": (0,)},
        {"boxes": ((0.5, 0.5, 0.2, 0.2),)},
        {"boxes": (), "classes": ()},
        {"files": ("b/1.jpg", "a/1.jpg")},  # another order is another run
        {"files": ("a/1.jpg",)},
        {"files": ("a/1.jpg", "b/2.jpg")},
    ],
)
def test_whatever_differs_tells(other):
    assert digest_of_labels(labels("/one", **other), NAMES) != digest_of_labels(labels("/one"), NAMES)


def test_the_order_need_not_count():
    turned = labels("/one", files=("b/1.jpg", "a/1.jpg"))
    digests = [digest_of_labels(x, NAMES, in_order=False) for x in (labels("/one"), turned, labels("/two"))]
    assert len(set(digests)) == 1
    assert digest_of_labels(labels("/one", classes=(0,)), NAMES, in_order=False) != digests[0]


def test_names_and_no_images():
    assert digest_of_labels(labels("/one"), {0: "dog", 1: "cat"}) != digest_of_labels(labels("/one"), NAMES)
    assert digest_of_labels([], NAMES) == digest_of_labels([], NAMES)


def test_a_run_says_what_it_was_made_of(tmp_path, data, teacher):
    arguments = {**FAST, "model": "retina_nano", "data": str(data), "teacher": str(teacher), "seed": 3}
    trainer = GIDTrainer(overrides={**arguments, "save_dir": str(tmp_path / "run")})
    train_one_epoch(trainer)
    (start,) = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert start["teacher"] == {
        "path": str(teacher),
        "sha256": hashlib.sha256(teacher.read_bytes()).hexdigest(),
        "weights": fingerprint(load_model(teacher)[0]),
    }
    assert start["data"]["train"]["images"] == 8
    record, split = load_model(trainer.last)[0].record, start["data"]["train"]
    assert (record["train_images"], record["train_contents"]) == (split["digest"], split["contents"])
    assert start["data"] == data_of(trainer)
    assert start["data"]["val"]["images"] == 4
    assert (start["seed"], start["from_epoch"], start["processes"], start["device"]) == (3, 1, 1, "cpu")
    assert start["command"] == sys.argv
    versions = start["versions"]
    assert versions["torch"] == torch.__version__.partition("+")[0]
    assert versions["ultralytics"] == ultralytics.__version__


def test_a_resumed_run_adds_a_start_and_stays_repeatable(tmp_path, teacher):
    data = write_data(tmp_path / "data")
    arguments = {**FAST, "epochs": 2, "model": "retina_nano", "data": str(data), "teacher": str(teacher), "seed": 3}
    trainer = GIDTrainer(overrides={**arguments, "save_dir": str(tmp_path / "run")})
    train_one_epoch(trainer)
    label = tmp_path / "data" / "labels" / "train" / "0.txt"
    before = label.read_text()
    label.write_text(before.replace("0 ", "1 ", 1))
    resumed = {"model": str(trainer.last), "resume": str(trainer.last)}
    with pytest.raises(UserError, match=r"has not the training images, boxes or classes .* began with \(digest "):
        GIDTrainer(overrides=resumed).train()
    label.write_text(before)
    GIDTrainer(overrides=resumed).train()
    starts = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert [start["from_epoch"] for start in starts] == [1, 2]
    assert starts[0]["data"] == starts[1]["data"]
    assert yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())["model"] == "retina_nano"
    assert main(["train", f"cfg={tmp_path / 'run' / 'args.yaml'}", f"save_dir={tmp_path / 'again'}"]) == 0
    weights = [load_model(tmp_path / run / "weights" / "best.pt")[0].state_dict() for run in ("run", "again")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


ONE, TWO = labels("/d", files=("1.jpg",)), labels("/d", files=("1.jpg", "2.jpg"))
OTHER = labels("/d", classes=(0,), files=("1.jpg", "2.jpg"))
KEPT = {"classes": None, "single_cls": False, "fraction": 1.0}


def described(train, val, path="/d.yaml", **more):
    loader = SimpleNamespace(dataset=SimpleNamespace(labels=val))
    known = {
        "train_split": split_of(train, NAMES),
        "data": {"names": NAMES, **more},
        "args": SimpleNamespace(data=path),
    }
    return data_of(SimpleNamespace(test_loader=loader, **known))


def looking_back(folder, now, args, path="/d.yaml"):
    """What changed, seen by a run on (train, val) that has `args`, since one in `folder` had two images in both."""
    (folder / "run.json").write_text(json.dumps({"starts": [{"data": described(TWO, TWO, path)}]}))
    (folder / "args.yaml").write_text(yaml.safe_dump(KEPT))
    return changed_since(folder / "weights" / "best.pt", described(*now), SimpleNamespace(**{**KEPT, **args}))


@pytest.mark.parametrize(
    ("now", "args", "changed"),
    [
        ((TWO, TWO), {}, []),
        ((TWO[::-1], TWO[::-1]), {}, []),  # rectangles are sorted, and equal ones as it happens
        ((OTHER, TWO), {}, ["train"]),
        ((TWO, OTHER), {}, ["val"]),
        ((ONE, ONE), {}, ["train", "val"]),
        ((ONE, TWO), {"fraction": 1}, ["train"]),
        ((ONE, ONE), {"fraction": 0.5}, []),  # parts that were asked for
        ((OTHER, OTHER), {"classes": [0]}, []),
        ((OTHER, OTHER), {"single_cls": True}, []),
    ],
)
def test_data_that_changed_since_a_run(tmp_path, now, args, changed):
    assert looking_back(tmp_path, now, args) == changed


def test_one_class_is_a_list_of_one(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"starts": [{"data": described(TWO, TWO)}]}))
    (tmp_path / "args.yaml").write_text(yaml.safe_dump({**KEPT, "classes": 0}))
    for classes, changed in ([0], ["val"]), ([1], []), ([0, 1], []):
        args = SimpleNamespace(**{**KEPT, "classes": classes})
        assert changed_since(tmp_path / "weights" / "best.pt", described(TWO, OTHER), args) == changed


@pytest.mark.parametrize("contents", ["", "[]", '{"starts": []}', '{"starts": [{"data": 1}]}', "[" * 100_000])
def test_of_other_data_or_an_unknown_run_nothing_is_said(tmp_path, contents):
    assert looking_back(tmp_path, (ONE, ONE), {}, path="/e.yaml") == []
    for name in ("run.json", "args.yaml"):
        looking_back(tmp_path, (ONE, ONE), {})
        (tmp_path / name).write_text(contents)
        assert changed_since(tmp_path / "weights" / "best.pt", described(ONE, ONE), SimpleNamespace(**KEPT)) == []
        (tmp_path / name).unlink()
        assert changed_since(tmp_path / "weights" / "best.pt", described(ONE, ONE), SimpleNamespace(**KEPT)) == []


def test_a_run_goes_on_with_its_images_in_another_order(monkeypatch):
    said = []
    monkeypatch.setattr(LOGGER, "warning", lambda text: said.append(text))
    one, turned, other = (split_of(images, NAMES) for images in (TWO, TWO[::-1], OTHER))
    older = {"train_images": one["digest"]}
    record = {**older, "train_contents": one["contents"]}
    for before in record, older, {}:
        check_goes_on(before, one, "d.yaml")
    assert not said
    check_goes_on(record, turned, "d.yaml")
    assert ["d.yaml has the training images in another order" in text for text in said] == [True]
    for before, now in ((record, other), (older, turned)):  # of the older one the order alone is known
        with pytest.raises(UserError, match=r"d.yaml has not the training images, boxes or classes .* \(digest "):
            check_goes_on(before, now, "d.yaml")


def test_a_converted_set_is_known_by_what_it_was_made_of(tmp_path):
    """Its own path has a digest of its files."""
    then = described(TWO, TWO, "/cache/d-1/data.yaml", converted_from="/d")
    (tmp_path / "run.json").write_text(json.dumps({"starts": [{"data": then}]}))
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(KEPT))
    for source, changed in ("/d", ["val"]), ("/e", []):
        now = described(TWO, OTHER, "/cache/d-2/data.yaml", converted_from=source)
        assert changed_since(tmp_path / "weights" / "best.pt", now, SimpleNamespace(**KEPT)) == changed


def test_older_entries_are_compared_in_their_order():
    new, turned, other = described(TWO, TWO)["val"], described(ONE, TWO[::-1])["val"], described(TWO, OTHER)["val"]
    old = {key: new[key] for key in ("images", "digest")}
    assert same_images(old, new)
    assert same_images(new, turned)
    assert not same_images(old, turned)
    assert not same_images(new, other)


def test_a_teacher_of_data_that_changed_is_said(tmp_path, monkeypatch):
    data = write_data(tmp_path / "data")
    plain = GIDTrainer(
        overrides={**FAST, "model": "retina_nano", "data": str(data), "save_dir": str(tmp_path / "teacher")}
    )
    plain.train()
    said = []
    monkeypatch.setattr(LOGGER, "warning", lambda text, *args, **kwargs: said.append(str(text)))
    distilled = {
        **FAST,
        "model": "retina_nano",
        "data": str(data),
        "teacher": str(plain.best),
        "project": str(tmp_path),
    }
    train_one_epoch(GIDTrainer(overrides={**distilled, "save_dir": str(tmp_path / "same")}))
    assert not any("than when teacher=" in text for text in said)
    assert any("has little to teach" in text for text in said)  # it is the student's plain run itself
    said.clear()
    image, label = (
        tmp_path / "data" / kind / "val" / f"0.{end}" for kind, end in (("images", "png"), ("labels", "txt"))
    )
    image.rename(tmp_path / "data" / "images" / "train" / "9.png")
    label.rename(tmp_path / "data" / "labels" / "train" / "9.txt")
    train_one_epoch(GIDTrainer(overrides={**distilled, "save_dir": str(tmp_path / "other")}))
    assert any("has other train and val images, boxes or classes than when teacher=" in text for text in said)
    assert any("images that now measure it" in text for text in said)
    assert not any("has little to teach" in text for text in said)  # that run was measured on other images


def test_commits_of_folders(tmp_path):
    assert commit_of(tmp_path) is None
    (tmp_path / "a").write_text("1")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "a"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert commit_of(tmp_path) == {"commit": head, "changed": False}
    (tmp_path / "a").write_text("2")
    assert commit_of(tmp_path) == {"commit": head, "changed": True}
    assert digest_of_file(tmp_path / "none") is None


def test_names_of_images_need_not_be_utf8():
    label = {"cls": np.zeros((1, 1)), "bboxes": np.full((1, 4), 0.5)}
    digests = [digest_of_labels([{**label, "im_file": os.fsdecode(name)}], {0: "a"}) for name in (b"/a/\xfc", b"/a/b")]
    assert digests[0] != digests[1]


def test_no_program_that_a_repository_names_is_run(tmp_path):
    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *words], check=True)

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    git("config", "core.fsmonitor", f"touch {tmp_path / 'ran'}; false")
    (tmp_path / "file").write_text("2")
    assert commit_of(tmp_path)["changed"] is True
    assert not (tmp_path / "ran").exists()


def test_an_installed_package_has_not_the_commit_around_it(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "own.py").write_text("1")
    for words in (["init", "-q"], ["add", "own.py"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    installed = tmp_path / ".venv" / "package.py"
    installed.parent.mkdir()
    installed.write_text("1")
    assert commit_of(tmp_path / "own.py") == commit_of(tmp_path)
    assert commit_of(installed) is None


def test_polygons_count():
    label = {"im_file": "/a.jpg", "cls": np.zeros((1, 1)), "bboxes": np.full((1, 4), 0.5)}
    polygons = [[np.array(points)] for points in ([[0.1, 0.1], [0.9, 0.1], [0.9, 0.9]], [[0.1, 0.1], [0.9, 0.9]])]
    digests = [digest_of_labels([{**label, "segments": polygon}], {0: "a"}) for polygon in ([], *polygons)]
    assert len(set(digests)) == 3
    assert digests[0] == digest_of_labels([label], {0: "a"})


def test_what_a_resumption_changes_is_written_and_said(tmp_path, monkeypatch):
    data = write_data(tmp_path / "data")
    arguments = {**FAST, "epochs": 3, "model": "retina_nano", "data": str(data), "save_dir": str(tmp_path / "run")}
    trainer = GIDTrainer(overrides=arguments)
    train_one_epoch(trainer)
    (tmp_path / "data" / "labels" / "val" / "0.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    said = []
    monkeypatch.setattr(LOGGER, "warning", lambda text, *args, **kwargs: said.append(str(text)))
    resumed = {"model": str(trainer.last), "resume": str(trainer.last)}
    train_one_epoch(GIDTrainer(overrides={**resumed, "patience": 7}))
    assert any("has other validation images, boxes or classes" in text for text in said)
    said.clear()
    GIDTrainer(overrides=resumed).train()
    assert not any("validation images" in text for text in said)
    starts = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert [start["changed_arguments"] for start in starts] == [{}, {"patience": 7}, {}]


@pytest.mark.parametrize("contents", ["", "[", "[]", '{"starts": [1]}', '{"events": 3}', "a,b\n1\n", "\x00" * 200_000])
def test_damaged_files_of_a_run_end_no_resumption(tmp_path, data, teacher, contents):
    arguments = {**FAST, "epochs": 2, "model": "retina_nano", "data": str(data), "teacher": str(teacher)}
    trainer = GIDTrainer(overrides={**arguments, "save_dir": str(tmp_path / "run"), "gradients": 1})
    train_one_epoch(trainer)
    names = ("run.json", "nonfinite.json", "gradients.csv", "gi_types.csv", "results.csv")
    for name in names:
        (tmp_path / "run" / name).write_text(contents)
        (tmp_path / "run" / f"{name}.damaged").write_text("of another time")
    GIDTrainer(overrides={"model": str(trainer.last), "resume": str(trainer.last)}).train()
    for name in names:
        assert (tmp_path / "run" / f"{name}.damaged").read_text() == "of another time"
        assert (tmp_path / "run" / f"{name}.damaged1").read_text() == contents
    assert len(json.loads((tmp_path / "run" / "run.json").read_text())["starts"]) == 1


def test_a_damaged_file_does_not_end_a_final_evaluation(tmp_path, data, teacher):
    arguments = {**FAST, "model": "retina_nano", "data": str(data), "teacher": str(teacher), "plots": True}
    trainer = GIDTrainer(overrides={**arguments, "save_dir": str(tmp_path / "run")})

    def stop() -> None:
        raise Interrupted

    trainer.final_eval = stop
    with pytest.raises(Interrupted):
        trainer.train()
    (tmp_path / "run" / "gi_types.csv").write_bytes(bytes(2000))
    GIDTrainer(overrides={"model": str(trainer.last), "resume": str(trainer.last)}).train()
    assert (tmp_path / "run" / "gi_types.csv.damaged").read_bytes() == bytes(2000)
    assert (tmp_path / "run" / "coco_metrics.json").is_file()


def test_a_file_of_arguments_does_not_overwrite_its_run(tmp_path, data):
    arguments = {**FAST, "model": "retina_nano", "data": str(data), "project": str(tmp_path), "name": "run"}
    first = GIDTrainer(overrides={**arguments, "exist_ok": True})
    first.train()
    assert main(["train", f"cfg={first.save_dir / 'args.yaml'}"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-2"]
