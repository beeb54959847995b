"""The commands of the documentation run: tiny, once, to the keys of what they write."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
PAIR = ("--student", "retina_nano", "--teacher", "retina_small")
SMALL = ("--imgsz", "64", "--batch", "1", "--rounds", "1")
RATIO = {"min", "median", "max"}


def run(script: str, *words: str, out: Path) -> tuple[dict, str]:
    """What a benchmark writes, and what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "YOLO_OFFLINE": "True"}
    command = [sys.executable, str(FOLDER / script), *words, "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text()), done.stdout


@pytest.mark.slow
def test_step(tmp_path) -> None:
    words = (*PAIR, *SMALL, "--classes", "3", "--teacher-precision", "fp32", "--profile", "terms")
    found, printed = run("step.py", *words, out=tmp_path / "out.json")
    seconds = {name: values[0] for name, values in found["seconds"].items()}
    ratio = seconds["gid"] / (seconds["student"] + seconds["teacher"])
    assert found["gid_step_over_student_plus_teacher"] == dict.fromkeys(RATIO, pytest.approx(ratio))
    ratio = seconds["gid"] / (seconds["student"] + seconds["frozen_teacher"])
    assert found["gid_step_over_student_plus_frozen_teacher"] == dict.fromkeys(RATIO, pytest.approx(ratio))
    assert found["terms_over_gid_step"]["median"] == pytest.approx(seconds["terms"] / seconds["gid"])
    assert "aten::_cdist_forward" in printed  # the relations' distances


@pytest.mark.slow
def test_memory(tmp_path) -> None:
    found, printed = run("memory.py", *PAIR, *SMALL, "--classes", "3", out=tmp_path / "out.json")
    assert "gid / (plain + teacher + activations)" in printed
    assert found


@pytest.mark.slow
def test_plain(tmp_path) -> None:
    words = ("--models", "retinanet", "--imgsz", "64", "--batch", "1", "--rounds", "1")
    found, _ = run("plain.py", *words, out=tmp_path / "out.json")
    losses, seconds = found["retinanet"]["losses"], found["retinanet"]["seconds"]
    assert losses["ours"] == pytest.approx(losses["torchvision"], rel=1e-3)
    for key, name in (
        ("ours_over_torchvision", "torchvision"),
        ("ours_over_torchvision_channels_last", "torchvision, channels_last"),
    ):
        assert found["retinanet"][key]["median"] == pytest.approx(seconds[name][0] / seconds["ours"][0])


@pytest.mark.slow
def test_data(tmp_path) -> None:
    words = ("--imgsz", "64", "--batch", "4", "--workers", "1", "--steps", "0.05", "--batches", "2", "--rounds", "1")
    found, printed = run("data.py", *words, out=tmp_path / "out.json")
    assert 0 <= found["disk"]["waiting"]["0.05"]["median"] <= 1
    assert "images/s" in printed


@pytest.mark.slow
def test_choice_of_instances(tmp_path) -> None:
    words = ("--imgsz", "64", "--classes", "2", "--batch", "1", "--rounds", "1")
    found, _ = run("gism.py", *words, out=tmp_path / "out.json")
    assert found


@pytest.mark.slow
def test_kept(tmp_path) -> None:
    words = ("--imgsz", "64", "--batch", "1", "--rounds", "1", "--steps", "1")
    found, _ = run("kept.py", *words, out=tmp_path / "out.json")  # which checks that before and after are equal
    pair = found["crops as sums of cells"]
    assert pair["before_over_after"]["median"] == pytest.approx(pair["seconds"][0][0] / pair["seconds"][0][1])


@pytest.mark.slow
def test_evaluation(tmp_path) -> None:
    pytest.importorskip("faster_coco_eval", reason="the peer of this benchmark is installed for it alone")
    words = ("--images", "200", "--detections", "5", "--classes", "2", "--rate", "1000")
    found, _ = run("coco_eval.py", *words, out=tmp_path / "out.json")
    assert found["columns"]["ours, 1000/s"] == pytest.approx(found["columns"]["pycocotools"], abs=1.01e-4)
    assert found["seconds"]["ours, 1000/s"]["beside"]["median"] > 0
