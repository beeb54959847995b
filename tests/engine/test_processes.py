"""Two processes on the CPU train what one trains."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from engine_helpers import FAST, write_data
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils.dist import generate_ddp_file

from gid_yolo.engine import parallel_trainer
from gid_yolo.engine import teacher as teacher_module
from gid_yolo.engine.checkpoint import load_any, load_model
from gid_yolo.engine.matches import read_matches
from gid_yolo.engine.parallel_trainer import ParallelTrainer
from gid_yolo.engine.run_state import KEY
from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.errors import UserError
from gid_yolo.ops.processes import shared_count

SCRIPT = Path(__file__).with_name("one_process.py")
STEPS = 20


def train(folder: Path, processes: int, overrides: dict, *words: str) -> subprocess.CompletedProcess:
    """Train by as many processes; with one, without a launcher."""
    folder.mkdir()
    path = folder / "overrides.json"
    path.write_text(json.dumps({"project": str(folder), **overrides}))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT), str(path), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, timeout=300)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """16 images in 4 batches of 4, with a different number of objects each; 20 steps, one a batch."""
    data = write_data(tmp_path_factory.mktemp("sixteen"), train=16)
    for i in range(0, 16, 3):
        label = data.parent / "labels" / "train" / f"{i}.txt"
        label.write_text(label.read_text() + "0 0.5 0.5 0.4 0.3\n" * (i % 2 + 1))
    own = {"data": str(data), "epochs": STEPS // 4, "nbs": 4, "save_period": 1, "device": "cpu", "freeze_bn": True}
    return {**FAST, **own, "lr0": 1e-3, "optimizer": "SGD", "val": False}


def state(folder: Path) -> dict[str, torch.Tensor]:
    """Weights in full precision after the last epoch."""
    (path,) = folder.rglob(f"epoch{STEPS // 4 - 1}.pt")
    return torch.load(path, weights_only=False)[KEY]["model"]


@pytest.mark.parametrize(
    ("model", "clip", "lr"),
    [("retina_nano", "together", 1e-4), ("retina_nano", "apart", 1e-5), ("fcos_nano", "", 1e-4)],
)
def test_two_processes_train_what_one_trains(tmp_path, settings, teachers, model, clip, lr):
    """Small steps: the choice of general instances is not continuous, and would make rounding larger.

    Clipped apart, the heads' steps are not divided by the features' gradient: they are as large at a smaller rate.
    """
    overrides = {**settings, "model": model, "lr0": lr}
    if clip:
        overrides |= {"teacher": str(teachers(model)), "distill_clip": clip}
    for processes in (1, 2):
        done = train(tmp_path / str(processes), processes, overrides)
        assert done.returncode == 0, done.stderr[-3000:]
        (run,) = (tmp_path / str(processes)).rglob("weights")
        assert load_model(run / "best.pt")[0].names == {0: "a", 1: "b"}
    one, two = state(tmp_path / "1"), state(tmp_path / "2")
    assert one.keys() == two.keys()
    (first,) = (tmp_path / "1").rglob("epoch0.pt")
    before = torch.load(first, weights_only=False)[KEY]["model"]
    assert max(float((one[key].float() - before[key].float()).abs().max()) for key in one) > 1e-4  # it learnt
    worst = max(float((one[key].float() - two[key].float()).abs().max()) for key in one)
    assert worst <= 1e-5, worst


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, settings):
    """A teacher of each kind, from other weights."""
    made: dict[str, Path] = {}

    def teacher(model: str) -> Path:
        if model not in made:
            folder = tmp_path_factory.mktemp("teachers") / model
            done = train(folder, 1, {**settings, "model": model, "seed": 1, "save_dir": str(folder / "run")})
            assert done.returncode == 0, done.stderr[-3000:]
            made[model] = folder / "run" / "weights" / "best.pt"
        return made[model]

    return teacher


@pytest.mark.parametrize("model", ["frcnn_nano", "yolo11n.yaml"])
def test_every_kind_trains_in_two_processes(tmp_path, settings, teachers, model):
    """Their losses hold random samples or batch norms of their own process: equal to one process they cannot be."""
    kept = {key: value for key, value in settings.items() if key != "freeze_bn"}
    teacher = teachers("retina_nano") if model.startswith("yolo") else None
    more = {"gid_response": 0} if model.startswith("yolo") else {}
    done = train(
        tmp_path / "run", 2, {**kept, **more, "model": model, "teacher": teacher and str(teacher), "epochs": 1}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (best,) = (tmp_path / "run").rglob("best.pt")
    assert load_model(best)[0].names == {0: "a", 1: "b"}
    matches = read_matches(best.parents[1] / "coco_matches.npz")  # of the images of both
    assert sorted(Path(name).name for name in matches.names) == ["0.png", "1.png", "2.png", "3.png"]
    assert sorted(matches.object_images) == [0, 1, 2, 3]


def test_a_process_that_dies_leaves_a_checkpoint(tmp_path, settings):
    done = train(tmp_path / "run", 2, {**settings, "model": "retina_nano"}, "die")
    assert done.returncode != 0
    assert "one_process.py FAILED" in done.stderr
    (last,) = (tmp_path / "run").rglob("last.pt")
    assert load_any(last)[1]["epoch"] == 0
    again = train(tmp_path / "again", 2, {"model": str(last), "resume": str(last)})
    assert again.returncode == 0, again.stderr[-3000:]
    assert load_any(last)[1]["optimizer"] is None  # finished


def test_a_nan_of_one_process_is_traced_by_it_and_stops_all_in_the_first_epoch(tmp_path, settings):
    done = train(tmp_path / "run", 2, {**settings, "model": "retina_nano"}, "nan", "0")
    assert done.returncode != 0
    assert "gid train: the student predicted NaN or infinite values in epoch 1" in done.stderr  # whoever says it
    assert "gid train: the gradient" not in done.stderr
    first, second = (json.loads(path.read_text())["events"] for path in sorted((tmp_path / "run").rglob("nonfinite*")))
    assert second[0]["not_finite"]["inputs"] == ["student features", "student predictions"]
    assert first[0]["not_finite"]["inputs"] == first[0]["not_finite"]["terms"] == []
    assert first[0]["not_finite"]["gradients"]  # the average of the two
    assert [event[0]["iteration"] for event in (first, second)] == [1, 1]
    assert [len(event[0]["files"]) for event in (first, second)] == [2, 2]
    assert not {*first[0]["files"]} & {*second[0]["files"]}
    assert not list((tmp_path / "run").rglob("last.pt"))


def test_a_nan_of_one_process_is_recovered_from_by_all(tmp_path, settings):
    done = train(tmp_path / "run", 2, {**settings, "model": "retina_nano", "epochs": 3}, "nan", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads(path.read_text()) for path in sorted((tmp_path / "run").rglob("nonfinite*")))
    assert first["recoveries"] == second["recoveries"] == 1
    assert [event["iteration"] for event in first["events"] + second["events"]] == [5, 5]  # 4 batches an epoch
    (best,) = (tmp_path / "run").rglob("best.pt")
    assert all(torch.isfinite(x).all() for x in load_model(best)[0].state_dict().values())


def test_a_launcher_may_start_one_process(tmp_path, settings, teachers):
    """As on nodes with one GPU each, where a run of a single node is tried first."""
    own = {"model": "retina_nano", "teacher": str(teachers("retina_nano")), "epochs": 1, "val": True, "save_period": -1}
    path = tmp_path / "overrides.json"
    path.write_text(json.dumps({"project": str(tmp_path), **settings, **own}))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    command = [sys.executable, *launcher, str(SCRIPT), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (best,) = tmp_path.rglob("best.pt")
    alone = GIDTrainer(overrides={**settings, **own, "save_dir": str(tmp_path / "alone")})
    alone.train()
    expected, found = (load_model(x)[0].state_dict() for x in (alone.best, best))
    assert all(torch.equal(found[key], x) for key, x in expected.items())


def test_a_teacher_is_not_trained_by_processes_that_wait_for_it(settings, monkeypatch):
    monkeypatch.setattr(teacher_module, "LOCAL_RANK", 0)
    with pytest.raises(UserError, match=r"train one model only: train it first, gid-train model=retina_nano data="):
        teacher_module.train_teacher("retina_nano", settings["data"], settings)


@pytest.mark.parametrize("device", [None, "0"])
def test_a_single_gpu_of_a_node_is_named(settings, monkeypatch, device):
    """What Ultralytics sets its process's device by; of two nodes, each with one."""
    monkeypatch.setattr(parallel_trainer, "LOCAL_RANK", 0)
    monkeypatch.setattr(parallel_trainer, "_end_with_a_sentence", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")

    def begin(self, *_):
        self.args = SimpleNamespace(device=device, seed=0)
        self.device, self.batch_size, self.ddp = torch.device("cuda", 0), 4, False
        self.callbacks = {"on_model_save": []}

    monkeypatch.setattr(DetectionTrainer, "__init__", begin)
    assert ParallelTrainer().args.device == "0"


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path, settings):
    done = train(tmp_path / "run", 2, {**settings, "model": "retina_nano", "batch": 3})
    assert done.returncode != 0
    assert "gid train: batch=3 must be a multiple of the 2 processes" in done.stderr
    assert "UserError" not in done.stderr


def test_our_arguments_reach_the_processes_of_ultralytics_launcher(tmp_path, settings, teachers):
    own = {"model": "retina_nano", "teacher": str(teachers("retina_nano")), "gid_feature": 3.0, "gradients": 2}
    trainer = GIDTrainer(overrides={**settings, **own, "epochs": 1, "save_dir": str(tmp_path / "run")})
    script = generate_ddp_file(trainer)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    args = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    assert {key: args[key] for key in own} == own
    with (tmp_path / "run" / "gradients.csv").open() as file:
        noted = list(csv.DictReader(file))
    assert {row["iteration"] for row in noted} == {"1", "3"}
    assert {"feat_loss", "rel_loss", "resp_loss"} < {row["term"] for row in noted}


def test_a_count_of_one_process():
    with torch.enable_grad():
        assert shared_count(torch.tensor(0)) == 1
        assert shared_count(torch.tensor(7)) == 7
