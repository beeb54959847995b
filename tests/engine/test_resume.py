"""A run that is killed, or cannot write, loses nothing but the epoch it was in."""

import csv
import errno
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_helpers import FAST, Interrupted, train_one_epoch, write_data

import gid_yolo.files as files
from gid_yolo.cfg import load_yaml
from gid_yolo.cli import main
from gid_yolo.engine.checkpoint import load_any, load_model
from gid_yolo.engine.config import BEFORE
from gid_yolo.engine.run_state import KEY, forget_epochs
from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.errors import UserError

KILLS = 10


def rows(path: Path) -> list[dict[str, str]]:
    """What `results.csv` says, but for the clock."""
    with path.open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "time"} for row in csv.DictReader(file)]


def clock(path: Path) -> list[float]:
    """Seconds since the run began, after every epoch."""
    with path.open(newline="") as file:
        return [float(row["time"]) for row in csv.DictReader(file)]


def equal_runs(one: Path, other: Path) -> None:
    """Weights, results and counts of instances of two finished runs, to the last bit."""
    for name in ("best.pt", "last.pt"):
        states = [load_model(folder / "weights" / name)[0].state_dict() for folder in (one, other)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), name
    assert rows(one / "results.csv") == rows(other / "results.csv")
    for times in (clock(folder / "results.csv") for folder in (one, other)):
        assert all(a < b for a, b in itertools.pairwise(times)), times  # however often it was interrupted
    assert (one / "gi_types.csv").read_bytes() == (other / "gi_types.csv").read_bytes()
    metrics = [json.loads((folder / "coco_metrics.json").read_text()) for folder in (one, other)]
    assert metrics[0] == metrics[1]


@pytest.fixture(scope="module")
def settings(tmp_path_factory, data, teacher):
    """24 images in 6 batches, a step of the optimiser every 4: it spans the ends of epochs."""
    folder = tmp_path_factory.mktemp("larger")
    larger = write_data(folder / "data", train=24)
    own = {"model": "retina_nano", "teacher": str(teacher), "data": str(larger), "epochs": 12, "nbs": 16}
    return {**FAST, **own, "save_period": 5, "degrees": 5.0, "translate": 0.1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, settings):
    """The run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    GIDTrainer(overrides={**settings, "save_dir": str(folder)}).train()
    return folder


def test_a_run_killed_ten_times_ends_as_if_it_had_not_been(settings, whole, tmp_path):
    overrides = tmp_path / "overrides.json"
    overrides.write_text(json.dumps({**settings, "save_dir": str(tmp_path / "run")}))
    script = Path(__file__).with_name("kill_runs.py")
    done = subprocess.run(
        [sys.executable, str(script), str(overrides), str(KILLS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report["saved"]) == KILLS
    assert len(set(report["saved"])) > 2  # they were spread over the run
    assert report["status"] == 0
    assert report["files"] == ["best.pt", "epoch0.pt", "epoch10.pt", "epoch5.pt", "last.pt"]  # and nothing half
    equal_runs(whole, tmp_path / "run")


def test_a_run_killed_in_ten_writes_ends_as_if_it_had_not_been(settings, whole, tmp_path):
    overrides = tmp_path / "overrides.json"
    # A best.pt without a last.pt beside it, as the first kills leave it, is not replaced unasked
    overrides.write_text(json.dumps({**settings, "save_dir": str(tmp_path / "run"), "exist_ok": True}))
    script = Path(__file__).with_name("die_writing.py")
    command = [sys.executable, str(script), str(overrides), str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report["torn"]) == KILLS
    assert {"best.pt", "last.pt"} < set(report["torn"])  # a checkpoint was half written, and others of the run's files
    assert report["files"] == ["best.pt", "epoch0.pt", "epoch10.pt", "epoch5.pt", "last.pt"]
    equal_runs(whole, tmp_path / "run")


def resume(path, **overrides):
    trainer = GIDTrainer(overrides={"model": str(path), "resume": str(path), **overrides})
    trainer.train()
    return trainer


def test_a_run_killed_in_its_final_evaluation_is_finished_by_it_alone(settings, whole, tmp_path):
    trainer = GIDTrainer(overrides={**settings, "save_dir": str(tmp_path / "run")})

    def stop() -> None:
        raise Interrupted

    trainer.final_eval = stop
    with pytest.raises(Interrupted):
        trainer.train()
    assert torch.load(trainer.last, weights_only=False)[KEY]["ended"]
    again = GIDTrainer(overrides={"model": str(trainer.last), "resume": str(trainer.last)})
    again.add_callback("on_train_epoch_start", lambda _: pytest.fail("an epoch was trained"))
    again.train()
    equal_runs(whole, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="is a finished run, there is nothing to resume"):
        resume(trainer.last)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_checkpoint_without_the_exact_state_goes_on_with_a_warning(settings, tmp_path, monkeypatch):
    log = []
    monkeypatch.setattr("gid_yolo.engine.resumable_trainer.LOGGER.warning", log.append)
    trainer = GIDTrainer(overrides={**settings, "epochs": 2, "save_dir": str(tmp_path / "run")})
    train_one_epoch(trainer)
    ckpt = torch.load(trainer.last, weights_only=False)
    del ckpt[KEY]
    torch.save(ckpt, trainer.last)
    resume(trainer.last)
    assert any("but not exactly" in text for text in log)
    assert [row["epoch"] for row in rows(tmp_path / "run" / "results.csv")] == ["1", "2"]


@pytest.mark.parametrize("crops", [True, False])
def test_a_resumed_run_of_before_says_what_it_goes_by_and_is_repeated(settings, tmp_path, crops):
    # A level is refused where nothing is cropped; the default is none
    before = BEFORE if crops else {**BEFORE, "gid_level": "detector", "gid_feature": 0, "gid_relation": 0}
    trainer = GIDTrainer(overrides={**settings, **before, "epochs": 2, "save_dir": str(tmp_path / "run")})
    train_one_epoch(trainer)
    ckpt = torch.load(trainer.last, weights_only=False)
    for key in BEFORE:
        del ckpt["train_args"][key]
    torch.save(ckpt, trainer.last)
    resume(trainer.last)
    args = load_yaml(tmp_path / "run" / "args.yaml")
    assert {key: args[key] for key in before} == before
    assert main(["train", f"cfg={tmp_path / 'run' / 'args.yaml'}", f"save_dir={tmp_path / 'again'}"]) == 0
    models = [load_model(tmp_path / name / "weights" / "best.pt")[0].state_dict() for name in ("run", "again")]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


def test_finished_files_hold_no_state(whole):
    for path in (whole / "weights").glob("[bl]*.pt"):
        ckpt = torch.load(path, weights_only=False)
        assert KEY not in ckpt
        assert ckpt["optimizer"] is None
        assert len(ckpt["train_results"]["epoch"]) == 12
    assert KEY in torch.load(whole / "weights" / "epoch5.pt", weights_only=False)


def test_a_full_disk_keeps_the_checkpoint_before(settings, tmp_path, monkeypatch):
    trainer = GIDTrainer(overrides={**settings, "save_dir": str(tmp_path / "run")})
    train_one_epoch(trainer)
    before = trainer.last.read_bytes()

    def full(file: int) -> None:
        if os.fstat(file).st_size > 2**16:  # there is room for small files, but for no checkpoint
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(
            UserError, match=r"epoch 2 could not be saved in .* \(No space left on device\): .*last.pt is"
        ):
            resume(trainer.last)
    assert trainer.last.read_bytes() == before
    assert load_any(trainer.last)[1]["epoch"] == 0
    assert not list(trainer.wdir.glob(".*"))
    resume(trainer.last)
    assert [row["epoch"] for row in rows(tmp_path / "run" / "results.csv")] == [str(i) for i in range(1, 13)]


@pytest.mark.parametrize("written", range(5))
def test_a_full_disk_is_said_of_every_file(settings, tmp_path, monkeypatch, written):
    trainer = GIDTrainer(overrides={**settings, "save_dir": str(tmp_path / "run"), "epochs": 3, "gradients": 1})
    train_one_epoch(trainer)
    before = trainer.last.read_bytes()
    done = []

    def full(file: int) -> None:
        if len(done) == written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done.append(os.fstat(file).st_size)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(
            UserError, match=r"could not be saved in .* \(No space left on device\): .*last.pt is whole"
        ):
            resume(trainer.last)
    assert trainer.last.read_bytes() == before
    resume(trainer.last)
    assert [row["epoch"] for row in rows(tmp_path / "run" / "results.csv")] == ["1", "2", "3"]


def test_rows_of_an_interrupted_epoch_are_forgotten(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("epoch,x\n1,0.5\n2,0.25\n3,")  # the last was being written
    forget_epochs(path, 2)  # epochs 0 and 1 are saved
    assert path.read_text() == "epoch,x\n1,0.5\n2,0.25\n"
    forget_epochs(path, 1)
    assert path.read_text() == "epoch,x\n1,0.5\n"
    forget_epochs(tmp_path / "none.csv", 1)
