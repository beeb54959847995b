"""What a file of weights says besides them chooses no data to fetch, no folder to write to, and no other file."""

import shutil
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from engine_helpers import FAST, train_one_epoch
from hostile_files import EVAL, PYTHON, SENTINEL, good, saved, with_parts
from hostile_pickles import yolo
from test_trust import CODE, WORDS, refused
from ultralytics.nn import tasks

from gid_yolo import GID
from gid_yolo.cli import main
from gid_yolo.engine.checkpoint import load_model
from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.engine.safe_load import safely
from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.errors import UserError

# Methods of Ultralytics' that are inherited --------------------------------------------


@pytest.mark.parametrize("model", ["retina_nano", "yolo11n.yaml"])
def test_load_reads_data(tmp_path, model: str) -> None:
    (tmp_path / "evil.pt").write_bytes(saved(good(zzz=EVAL)))
    with pytest.raises(UserError, match=CODE):
        GID(model).load("evil.pt")
    assert not Path(SENTINEL).exists()
    with pytest.raises(UserError, match="tune"):
        GID(model).tune(data="x.yaml")


def test_load_takes_weights_over(tmp_path) -> None:
    (tmp_path / "good.pt").write_bytes(saved(good()))
    theirs = load_model("good.pt")[0].state_dict()
    ours = GID("retina_nano").load("good.pt").model.state_dict()
    equal = [name for name, v in theirs.items() if v.shape == ours[name].shape and torch.equal(v, ours[name])]
    assert len(equal) > 0.9 * len(theirs)


def _noting(forward, seen):
    def noted(self, *args, **kwargs):
        seen.append(tasks.SAFE_LOAD)
        return forward(self, *args, **kwargs)

    return noted


def test_networks_are_used_with_the_switch_on(data, tmp_path, monkeypatch) -> None:
    (tmp_path / "good.pt").write_bytes(saved(good()))
    cv2.imwrite("x.png", np.zeros((64, 64, 3), np.uint8))
    for mode in (
        lambda model: model.val(data=str(data), imgsz=64),
        lambda model: model.predict("x.png", imgsz=64),
        lambda model: list(model.predict("x.png", imgsz=64, stream=True)),
        lambda model: model.export(imgsz=64),
    ):
        seen: list[bool] = []
        note = _noting(GIDDetectionModel.forward, seen)
        with monkeypatch.context() as patch:
            patch.setattr(GIDDetectionModel, "forward", note)
            mode(GID("good.pt"))
        assert seen
        assert all(seen)
        assert tasks.SAFE_LOAD is False


def test_the_switch_stays_on_while_any_thread_needs_it() -> None:
    entered, left, seen = threading.Event(), threading.Event(), []

    def first() -> None:
        with safely():
            entered.wait()
        left.set()

    thread = threading.Thread(target=first)
    thread.start()
    with safely():
        entered.set()
        left.wait()
        seen.append(tasks.SAFE_LOAD)
        with safely(trust=True):
            seen.append(tasks.SAFE_LOAD)
    thread.join()
    assert seen == [True, True]
    assert tasks.SAFE_LOAD is False


# Data --------------------------------------------


@pytest.fixture
def fetching(tmp_path) -> Path:
    """A checkpoint that names a data yaml with a program in it."""
    text = f"path: nowhere\ntrain: a\nval: a\nnames: {{0: a, 1: b}}\ndownload: |\n  {PYTHON}\n"
    (tmp_path / "evil.yaml").write_text(text)
    state = {"state": {}, "param_groups": []}
    args = {"imgsz": 64, "data": str(tmp_path / "evil.yaml")}
    (tmp_path / "model.pt").write_bytes(saved(good(train_args=args, epoch=1, optimizer=state)))
    return tmp_path / "model.pt"


@pytest.mark.parametrize(
    "words",
    [
        ["val", "model={path}"],
        ["train", "model={path}", *WORDS],
        ["train", "resume={path}"],
        ["train", "model={path}", "resume=True"],
        ["export", "model={path}", "quantize=8"],
    ],
    ids=" ".join,
)
def test_data_of_a_file_is_not_fetched(capsys, fetching, words) -> None:
    text = refused(capsys, *(word.format(path=fetching) for word in words))
    assert "names data that is not here or would be downloaded" in text
    assert "give data=" in text


@pytest.mark.parametrize("name", ["coco8.yaml", "https://example.org/x.yaml", "x.ndjson"])
def test_sets_that_are_not_here(capsys, tmp_path, name: str) -> None:
    (tmp_path / "model.pt").write_bytes(saved(good(train_args={"data": name}, epoch=1, optimizer={
        "state": {}, "param_groups": []})))  # fmt: skip
    assert "give data=" in refused(capsys, "train", f"resume={tmp_path / 'model.pt'}")


def test_data_of_a_file_that_is_at_hand(data, tmp_path) -> None:
    path = data.parent / "with_program.yaml"
    path.write_text(data.read_text() + f"\npath: {data.parent}\ndownload: |\n  {PYTHON}\n")
    (tmp_path / "model.pt").write_bytes(saved(good(train_args={"imgsz": 64, "data": str(path)})))
    assert main(["val", f"model={tmp_path / 'model.pt'}", "imgsz=64"]) == 0
    assert not Path(SENTINEL).exists()
    path.unlink()


# Places --------------------------------------------


def test_a_resumed_run_goes_on_where_its_file_lies(data, tmp_path) -> None:
    trainer = GIDTrainer(overrides={**FAST, "model": "retina_nano", "data": str(data), "epochs": 2})
    train_one_epoch(trainer)
    contents = torch.load(trainer.last, weights_only=True)
    contents["train_args"]["save_dir"] = str(tmp_path / "victim")
    (tmp_path / "mine" / "weights").mkdir(parents=True)
    (tmp_path / "mine" / "last.pt").touch()
    torch.save(contents, tmp_path / "mine" / "weights" / "last.pt")
    assert main(["train", f"resume={tmp_path / 'mine' / 'weights' / 'last.pt'}"]) == 0
    assert not (tmp_path / "victim").exists()
    assert (tmp_path / "mine" / "weights" / "best.pt").is_file()


def test_a_file_to_resume_that_does_not_exist(data) -> None:
    train_one_epoch(GIDTrainer(overrides={**FAST, "model": "retina_nano", "data": str(data), "epochs": 2}))
    with pytest.raises(UserError, match=r"resume=other\.pt does not exist"):
        GID("retina_nano").train(resume="other.pt")
    with pytest.raises(UserError, match=r"resume=other\.pt does not exist"):
        GIDTrainer(overrides={"resume": "other.pt"})


@pytest.mark.parametrize("key", ["save_dir", "project", "resume", "teacher", "pretrained"])
def test_a_models_settings_choose_no_place(data, tmp_path, key: str) -> None:
    victim = tmp_path / "victim"
    for path in (tmp_path / "model.pt", tmp_path / "model.yaml"):
        settings = {"train": {key: str(victim), "epochs": 1, "imgsz": 64}}
        contents = with_parts(settings=settings)
        path = tmp_path / "model.pt"
        path.write_bytes(saved(contents))
        trainer = GIDTrainer(overrides={**FAST, "model": str(path), "data": str(data)})
        assert str(victim) not in map(str, vars(trainer.args).values())
        assert trainer.args.imgsz == 64
    assert not victim.exists()


# Names --------------------------------------------


@pytest.mark.parametrize("name", ["a'b.pt", " first.pt", "John's models/best.pt", "yolov5n.pt"])
def test_the_file_that_was_looked_at_is_opened(tmp_path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(saved({**yolo(), "train_args": {"imgsz": 96}}))
    for other in ("ab.pt", "first.pt", "yolov5nu.pt"):
        shutil.copy(path, other)
        (tmp_path / other).write_bytes(saved({**yolo(), "train_args": {"imgsz": 32}}))
    assert load_model(path)[0].args["imgsz"] == 96
    assert load_model(name)[0].args["imgsz"] == 96


# Values --------------------------------------------


def test_values_that_hold_each_other(tmp_path) -> None:
    value = ["ha"] * 10
    for _ in range(9):
        value = [value] * 10
    for contents in (good(train_args={"data": value}), yolo(lambda model, _: model.yaml.update(joke=value))):
        (tmp_path / "a.pt").write_bytes(saved(contents))
        with pytest.raises(UserError, match="more values than any model"):
            load_model("a.pt")


# Words --------------------------------------------


def test_what_pytorch_refuses_is_said_as_what_the_scan_refuses(tmp_path) -> None:
    (tmp_path / "a.pt").write_bytes(saved(yolo(lambda model, layer: vars(model).update(names={np.int64(0): "a"}))))
    with pytest.raises(UserError) as caught:
        load_model("a.pt")
    assert "holds numpy.dtypes.Int64DType, so that opening it could run code" in str(caught.value)
    assert str(caught.value).isprintable()


def test_no_file_moves_the_terminal(tmp_path) -> None:
    name = "\x1b]0;owned\x07\x1b[2Jmodel.0.extra"
    for contents in (with_parts(state={name: torch.zeros(2)}), with_parts(settings={name: {"a": 10**9}})):
        (tmp_path / "a.pt").write_bytes(saved(contents))
        with pytest.raises(UserError) as caught:
            load_model("a.pt")
        assert str(caught.value).isprintable()
