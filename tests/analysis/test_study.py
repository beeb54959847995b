"""`gid-study` on real runs: tiny ones, as processes of their own."""

import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from engine_helpers import FAST, train_one_epoch

from gid_yolo.analysis.study import seeds_of, study
from gid_yolo.analysis.study_folder import StudyFolder
from gid_yolo.analysis.study_plan import Run
from gid_yolo.analysis.study_runs import Runner, _locked, devices_of
from gid_yolo.cli import main
from gid_yolo.engine.coco_eval import CocoAccumulator
from gid_yolo.engine.matches import write_matches
from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.errors import UserError

ROWS = [
    {"name": "teacher", "kind": "teacher"},
    {"name": "plain", "kind": "plain", "paper": {"mAP": 30.0}},
    {"name": "relation", "args": {"gid_feature": 0, "gid_response": 0}, "paper": {"mAP": 31.0}},
    {"name": "mimicking", "args": {"distill": "mimicking"}},  # which needs proposals
]


@pytest.fixture(scope="module")
def own_study(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("study") / "mine.yaml"
    groups = [{"name": "all", "rows": ROWS}]
    path.write_text(yaml.safe_dump({"title": "Mine", "paper": "toys", "columns": ["mAP", "AP50"], "groups": groups}))
    return path


def start(own_study: Path, project: Path, data: Path, checkpoints: dict[str, str], **kwargs):
    teacher = checkpoints["retina_nano"]
    common = {
        **FAST,
        "model": "retina_nano",
        "teacher": teacher,
        "data": str(data),
        "project": str(project),
        "seeds": 1,
    }
    return study(own_study, **{**common, **kwargs})


@pytest.fixture(scope="module")
def finished(tmp_path_factory, own_study, data, checkpoints) -> tuple[Path, UserError]:
    project = tmp_path_factory.mktemp("project")
    with pytest.raises(UserError) as error:
        start(own_study, project, data, checkpoints, jobs=2, longer=2)
    return project, error.value


def runs_of(project: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((project / "mine.json").read_text())["rows"]}


@pytest.mark.slow
def test_every_cell_is_what_its_run_measured(finished) -> None:
    project, _ = finished
    rows = runs_of(project)
    with (project / "mine.csv").open(newline="") as stream:
        table = {(row["row"], row["column"]): row for row in csv.DictReader(stream)}
    for name in ("teacher", "plain", "relation"):
        run = rows[name]["runs"]["0"]["run"]
        measured = json.loads((project / "runs" / run / "coco_metrics.json").read_text())
        assert measured["images"] == 4
        for column in ("mAP", "AP50"):
            assert float(table[name, column]["mean"]) == pytest.approx(measured[column], abs=1e-4)
    gain = float(table["relation", "mAP"]["mean"]) - float(table["plain", "mAP"]["mean"])
    assert float(table["relation", "mAP"]["gain"]) == pytest.approx(gain, abs=2e-4)
    for name in ("plain", "plain, 2 times as long", "relation"):
        with (project / "runs" / rows[name]["runs"]["0"]["run"] / "results.csv").open(newline="") as stream:
            last = list(csv.DictReader(stream))[-1]
        assert rows[name]["minutes"] == {"0": pytest.approx(float(last["time"]) / 60, abs=0.01)}
    assert (rows["teacher"]["minutes"], rows["mimicking"]["minutes"]) == ({}, {})
    assert (table["relation", "mAP"]["gain_low"], table["relation", "mAP"]["paper_gain"]) == ("", "1.0")
    images = rows["relation"]["columns"]["mAP"]["gain"]["images"]
    assert images["low"] <= images["high"]
    assert images["count"] == 4


@pytest.mark.slow
def test_the_rows_trained_what_they_say(finished) -> None:
    project, _ = finished
    rows = runs_of(project)
    plain, longer, relation = (
        yaml.safe_load((project / "runs" / rows[name]["runs"]["0"]["run"] / "args.yaml").read_text())
        for name in ("plain", "plain, 2 times as long", "relation")
    )
    apart = {key for key in plain if plain[key] != longer[key]}
    assert apart == {"epochs", "name", "save_dir"}
    assert (plain["epochs"], longer["epochs"]) == (1, 2)
    apart = {key for key in plain if plain[key] != relation[key]}
    assert apart == {"teacher", "teacher_min_ap", "distill_until", "gid_feature", "gid_response", "name", "save_dir"}


@pytest.mark.slow
def test_a_run_that_fails_stops_no_other_and_is_reported(finished) -> None:
    project, error = finished
    assert "1 of 5 runs failed" in str(error)
    assert "distill=mimicking" in str(error)
    assert (project / "mine.png").stat().st_size > 10_000
    text = (project / "mine.md").read_text()
    assert "FAILED: all, mimicking: gid train: distill=mimicking compares features of proposals" in text
    assert runs_of(project)["mimicking"]["columns"]["mAP"]["spread"] is None


@pytest.mark.slow
def test_started_again_it_only_does_what_is_left(finished, own_study, data, checkpoints) -> None:
    project, _ = finished
    logs = {path: path.stat().st_mtime_ns for path in (project / "runs").glob("*.log")}
    before = runs_of(project)
    with pytest.raises(UserError, match="1 of 5 runs failed"):
        start(own_study, project, data, checkpoints, longer=2)
    changed = [path.name for path in logs if path.stat().st_mtime_ns != logs[path]]
    assert len(logs) == 5
    assert len(changed) == 1  # the one that failed is tried again
    assert "mimicking" in changed[0]
    assert runs_of(project) == before


@pytest.mark.slow
def test_another_split_measures_the_same_weights(finished, own_study, data, checkpoints) -> None:
    project, _ = finished
    weights = {path: path.stat().st_mtime_ns for path in project.glob("runs/*/weights/best.pt")}
    with pytest.raises(UserError, match="1 of 5 runs failed"):
        start(own_study, project, data, checkpoints, split="train", jobs=2, longer=2)
    assert {path: path.stat().st_mtime_ns for path in project.glob("runs/*/weights/best.pt")} == weights
    for row in list(runs_of(project).values())[:4]:
        assert row["columns"]["mAP"]["spread"]["count"] == 1
    assert {json.loads(p.read_text())["images"] for p in project.glob("runs/*/train/coco_metrics.json")} == {8}


def test_a_run_goes_on_from_its_last_epoch(tmp_path, data) -> None:
    run = Run("plain", {"model": "retina_nano", "data": str(data), **FAST, "epochs": 2, "classes": [1]})
    runner = Runner(tmp_path, "val", [None])
    assert runner.command(run)[0] == "train"
    assert "model=retina_nano" in runner.command(run)
    place = {"project": str(tmp_path), "name": "plain", "exist_ok": True}
    train_one_epoch(GIDTrainer(overrides={**run.args, **place}))
    last = tmp_path / "plain" / "weights" / "last.pt"
    assert runner.command(run) == ["train", "resume=True", f"model={last}", f"save_dir={last.parents[1]}"]

    moved = tmp_path.with_name("moved")  # the folder may be moved in between
    tmp_path.rename(moved)
    runner, last = Runner(moved, "val", [None]), moved / "plain" / "weights" / "last.pt"
    runner.execute([run], lambda: None)
    assert runner.failed == {}
    assert runner.results(run).keys() >= {"mAP", "AR_L"}
    assert runner.command(run) is None
    assert not tmp_path.exists()
    rows = (moved / "plain" / "results.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0].strip() for row in rows] == ["1", "2"]

    (moved / "plain" / "coco_metrics.json").unlink()  # killed in its final evaluation: only that is repeated
    words = runner.command(run)
    assert words[:2] == ["val", f"model={last.with_name('best.pt')}"]
    assert {f"project={moved}", "name=plain", "split=val", "imgsz=64", "batch=4", "classes=[1]"} <= set(words)
    last.write_bytes(last.read_bytes()[:1000])  # the machine went down while it was written
    assert runner.command(run)[:2] == ["train", "plots=False"]
    assert last.is_file()  # to look is not to delete


@pytest.mark.slow
def test_a_run_in_smaller_batches_than_asked_is_no_result(finished, tmp_path) -> None:
    project, _ = finished
    name = runs_of(project)["plain"]["runs"]["0"]["run"]
    folder, args = StudyFolder(tmp_path, "val"), {**FAST, "model": "retina_nano", "data": "data.yaml"}
    for aside in ["plain.batch4"], ["plain.batch4", "plain.batch4-2"]:  # the second try ends as the first did
        shutil.copytree(project / "runs" / name, tmp_path / "plain")
        assert folder.set_aside_smaller(Run("plain", {**args, "batch": 4})) is None  # which it was trained with
        # The model's yaml says 8: as after Ultralytics halved it
        smaller = {key: value for key, value in args.items() if key != "batch"}
        assert "the memory was too small for batch=8" in folder.set_aside_smaller(Run("plain", smaller))
        assert sorted(path.name for path in tmp_path.iterdir()) == aside


@pytest.mark.slow
def test_a_run_of_another_versions_defaults_is_not_taken_for_one_of_these(finished, tmp_path) -> None:
    project, _ = finished
    found = runs_of(project)["relation"]["runs"]["0"]
    shutil.copytree(project / "runs" / found["run"], tmp_path / "relation")
    runner, run = Runner(tmp_path, "val", [None]), Run("relation", found["args"])
    runner.check_defaults(run)
    file = tmp_path / "relation" / "args.yaml"
    text = file.read_text()
    file.write_text(text.replace("gid_top_k: 10", "gid_top_k: 12"))
    with pytest.raises(UserError, match=r"begun with gid_top_k=12, which is 10 in this version: give another project="):
        runner.execute([run], lambda: None)
    file.write_text("\n".join(line for line in text.splitlines() if not line.startswith("gid_top_k")))
    runner.check_defaults(run)  # a version that had no such argument
    before = "\n".join(line for line in text.splitlines() if not line.startswith("gid_level"))
    file.write_text(before)
    runner.check_defaults(run)  # it went by size, as a RetinaNet still does
    with pytest.raises(UserError, match="begun with gid_level=size, which is detector in this version"):
        runner.check_defaults(Run("relation", {**run.args, "model": "frcnn_nano"}))
    assert "gid_relation: 40.0" in before
    file.write_text(before.replace("gid_relation: 40.0", "gid_relation: 0"))  # then nothing is cropped
    runner.check_defaults(Run("relation", {**run.args, "model": "frcnn_nano", "gid_relation": 0}))
    file.write_text("\n".join(line for line in before.splitlines() if not line.startswith("distill_until")))
    with pytest.raises(UserError, match=r"begun with distill_until=1.0, which is 0.5 in this version"):
        runner.check_defaults(Run("relation", {k: v for k, v in run.args.items() if k != "distill_until"}))
    lines = [line for line in text.splitlines() if not line.startswith("distill_clip")]
    file.write_text("\n".join(lines))
    runner.check_defaults(run)  # AdamW's are clipped together as before
    with pytest.raises(UserError, match="begun with distill_clip=together, which is auto in this version"):
        runner.check_defaults(Run("relation", {**run.args, "optimizer": "SGD"}))
    for began in ("", "distill_clip: together"):
        file.write_text("\n".join([*lines, began]).replace("gid_relation: 40.0", "gid_relation: 0"))
        runner.check_defaults(Run("relation", {**run.args, "gid_relation": 0, "optimizer": "SGD"}))  # no features then
    file.write_text("model: [")
    with pytest.raises(UserError, match=r"is not a yaml file.* so that the run begins anew"):
        runner.check_defaults(run)


def test_a_finished_run_is_resampled_once(tmp_path) -> None:
    accumulator, box = CocoAccumulator(1), np.array([[10.0, 10, 60, 60]])
    for name, found in (("a", box), ("b", np.zeros((0, 4)))):  # of two objects one is found: AP 51 / 101
        accumulator.add(box, np.zeros(1), found, np.ones(len(found)), np.zeros(len(found)), name=name)
    home = tmp_path / "plain" / "test"
    home.mkdir(parents=True)
    run, runner = Run("plain", {}), Runner(tmp_path, "test", [None])
    write_matches(accumulator.matches(), home / "coco_matches.npz")
    assert runner.resampled(run) is None  # it is not finished
    (home / "coco_metrics.json").write_text(json.dumps({"split": "test", **accumulator.columns()}))
    found = runner.resampled(run)
    assert found.images == ("a", "b")
    assert set(found.maps.round(6)) == {0, round(5100 / 101, 6), 100}  # b twice, both, a twice
    (home / "coco_matches.npz").unlink()
    assert runner.resampled(run) is found
    assert Runner(tmp_path, "test", [None]).resampled(run) is None
    assert runner.results(run)["mAP"] == pytest.approx(5100 / 101, abs=1e-4)


def test_a_signal_ends_it_as_an_interrupt_does(tmp_path, data) -> None:
    words = [
        "model=retina_nano",
        "teacher=retina_small",
        f"data={data}",
        "epochs=500",
        "imgsz=64",
        f"project={tmp_path}",
    ]
    process = subprocess.Popen([sys.executable, "-m", "gid_yolo.cli", "study", "verdict", *words])
    while not (logs := list(tmp_path.glob("runs/*.log"))):
        assert process.poll() is None
        time.sleep(0.2)
    time.sleep(2)
    process.terminate()
    assert process.wait(timeout=60) == 130
    with logs[0].open("a") as log:
        assert _locked(log)  # nothing trains any more


def test_two_studies_do_not_train_one_run(tmp_path, data) -> None:
    run = Run("plain", {"model": "retina_nano", "data": str(data), **FAST})
    runner = Runner(tmp_path, "val", [None])
    with (tmp_path / "plain.log").open("a") as other:
        assert _locked(other)
        assert runner._start(run, None) is None
        assert run.name not in runner.failed
    process = runner._start(run, None)  # the lock went with the other
    with (tmp_path / "plain.log").open("a") as third:
        assert not _locked(third)  # and is now held by the process, whatever becomes of this one
        process.popen.kill()
        process.popen.wait()
        assert _locked(third)


def test_an_interrupt_leaves_no_process_behind(tmp_path, data) -> None:
    long = Run("long", {"model": "retina_nano", "data": str(data), **FAST, "epochs": 500})
    bad = Run("bad", {"model": "retina_nano", "data": str(data), **FAST, "lr_gamma": 7})

    def interrupt() -> None:
        raise KeyboardInterrupt

    runner, began = Runner(tmp_path, "val", [None, None]), time.time()
    with pytest.raises(KeyboardInterrupt):
        runner.execute([long, bad], interrupt)
    assert runner.failed.keys() == {"bad"}
    assert "lr_gamma=7" in runner.failed["bad"]
    assert time.time() - began < 120
    with (tmp_path / "long.log").open("a") as log:
        assert _locked(log)


def test_a_student_waits_for_its_teacher_and_fails_with_it(tmp_path, data) -> None:
    teacher = Run("teacher", {"model": "retina_nano", "data": str(data), **FAST, "lr_gamma": 7})
    student = Run("student", {"model": "retina_nano", "data": str(data), **FAST}, None, teacher)
    runner = Runner(tmp_path, "val", [None, None])
    assert runner._start(student, None) is None
    runner.execute([teacher, student], lambda: None)
    assert runner.failed.keys() == {"teacher", "student"}
    assert runner.failed["student"] == "its teacher could not be trained"
    assert not (tmp_path / "student").exists()


def test_devices_are_slots() -> None:
    assert devices_of("0,1", 1) == ["0", "1"]
    assert devices_of([2, 3], 2) == ["2", "3", "2", "3"]
    assert devices_of("cpu", 3) == ["cpu"] * 3
    assert devices_of(1, 1) == ["1"]


def test_seeds_are_a_number_or_a_list() -> None:
    assert (seeds_of(3), seeds_of([3, 7])) == ((0, 1, 2), (3, 7))


def test_the_command_line_needs_a_study(capsys) -> None:
    assert main(["study"]) == 2
    assert "say which study, e.g. gid-study verdict" in capsys.readouterr().err
    assert main(["study", "model=retina_nano"]) == 2
    assert "say which study" in capsys.readouterr().err
    assert main(["study", "table9"]) == 2
    assert "'table9' is not known" in capsys.readouterr().err


@pytest.mark.slow
def test_data_that_changed_end_it_in_the_first_run(tmp_path, data, checkpoints, own_study) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(data.parent, copy)
    again = {
        "data": copy / "data.yaml",
        "project": tmp_path / "study",
        "own_study": own_study,
        "checkpoints": checkpoints,
    }
    with pytest.raises(UserError, match="runs failed"):  # of mimicking
        start(**again)
    (copy / "labels" / "train" / "0.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    with pytest.raises(UserError, match="were trained on other train images, boxes or classes"):
        start(**again, seeds=2)
    begun = [run for run in (tmp_path / "study" / "runs").iterdir() if run.is_dir() and "seed1" in run.name]
    assert len(begun) == 1
    assert not (begun[0] / "coco_metrics.json").is_file()
