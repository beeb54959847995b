"""The proof of accuracy keeps what its runs measured: `benchmarks/accuracy` on a study of tiny runs."""

import csv
import importlib
import json
from pathlib import Path

import pytest
import yaml
from engine_helpers import FAST

from gid_yolo.analysis.study import study

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "accuracy"


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("train"), importlib.import_module("report")


@pytest.fixture(scope="module")
def project(tmp_path_factory, data, checkpoints) -> Path:
    folder = tmp_path_factory.mktemp("accuracy")
    rows = [{"name": "teacher", "kind": "teacher"}, {"name": "plain", "kind": "plain"}, {"name": "GID"}]
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"title": "", "columns": ["mAP"], "groups": [{"name": "all", "rows": rows}]}))
    pair = {"model": "retina_nano", "teacher": checkpoints["retina_nano"], "data": str(data)}
    given = {**FAST, **pair, "epochs": 2, "gradients": 1, "project": str(folder / "runs")}
    for split in ("val", "train"):
        study(path, seeds=[0, 1], split=split, jobs=2, **given)
    return folder / "runs"


@pytest.mark.slow
def test_a_line_holds_what_its_run_measured(scripts, project, tmp_path) -> None:
    train, _ = scripts
    results = tmp_path / "results" / "accuracy.jsonl"
    assert train.collect(project, results) == 1 + 2 * 2  # the teacher, and two rows of two seeds
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    for line in lines:
        home = project / "runs" / line["run"]
        measured = json.loads((home / "coco_metrics.json").read_text())
        split = measured["split"]  # the teacher has one folder for both
        assert line[split]["mAP"] == measured["mAP"]
        assert {"val", "train"} <= set(line)
        if line["kind"] != "teacher":
            with (home / "results.csv").open(newline="") as file:
                last = list(csv.DictReader(file))[-1]
            assert line["epochs"] == 2 == len(line["curve"]) == int(last["epoch"])
            assert line["seconds"] == pytest.approx(float(last["time"]), abs=0.1)
            assert line["args"]["seed"] == line["seed"]
            assert ("pulls" in line) == (line["kind"] == "distilled")
            assert (line["teacher"] is None) == (line["kind"] == "plain")
            assert line["teacher"] is None or line["teacher"]["path"] == "best.pt"
    before = results.read_text()
    train.collect(project, results)
    assert results.read_text() == before


@pytest.mark.slow
def test_lines_of_other_students_keep_their_teacher_and_no_path(scripts, project, tmp_path) -> None:
    train, _ = scripts
    (tmp_path / "runs").symlink_to(project / "runs")
    for path in project.glob("*.json"):
        text = path.read_text()
        (tmp_path / path.name).write_text(text)
        found = json.loads(text)
        found["settings"]["models"] = {"all": "retina_own under another"}
        for row in found["rows"]:
            for run in row["runs"].values():
                run["args"] |= {"model": "/here/retina_own.yaml", "backbone_weights": "/here/a.safetensors"}
        (tmp_path / f"own-{path.name}").write_text(json.dumps(found))
    results = tmp_path / "accuracy.jsonl"
    assert train.collect(tmp_path, results) == 2 * (1 + 2 * 2)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["models"] for line in lines if line["kind"] == "teacher"] == sorted({x["models"] for x in lines})
    assert "/here" not in results.read_text()
    assert {x["args"].get("backbone_weights") for x in lines} == {None, "a.safetensors"}


def test_a_plain_student_that_trained_longer_is_one_of_its_own_schedule(scripts, tmp_path) -> None:
    train, _ = scripts
    run = {"run": "n-1", "args": {"epochs": 40, "seed": 2}, "results": {"mAP": 30.0}}
    rows = [{"name": "plain, 2 times as long", "kind": "longer", "group": "all", "runs": {"2": run}}]
    settings = {"data": "/a/cells.yaml", "models": {"all": "n under t"}, "split": "test", "arguments": {}}
    (tmp_path / "verdict.json").write_text(json.dumps({"settings": settings, "rows": rows}))
    results = tmp_path / "results.jsonl"
    assert train.collect(tmp_path, results) == 1
    line = json.loads(results.read_text())
    assert (line["row"], line["kind"], line["epochs"], line["seed"]) == ("plain", "plain", 40, 2)


def test_pairs_of_another_recipe_are_told_apart(scripts, tmp_path) -> None:
    train, _ = scripts
    for i, more in enumerate(({}, {"lr0": 0.002}, {"mosaic": 1.0, "close_mosaic": 4})):
        run = {"run": f"n-{i}", "args": {"epochs": 4, **more}, "results": {"mAP": 30.0}}
        rows = [{"name": "plain", "kind": "plain", "group": "all", "runs": {"0": run}}]
        settings = {"data": "cells.yaml", "models": {"all": "n under t"}, "split": "test", "arguments": more}
        (tmp_path / f"{run['run']}.json").write_text(json.dumps({"settings": settings, "rows": rows}))
    results = tmp_path / "results.jsonl"
    assert train.collect(tmp_path, results) == 3
    found = {x["models"]: x["run"] for x in map(json.loads, results.read_text().splitlines())}
    assert found == {"n under t": "n-0", "n under t, lr0=0.002": "n-1", "n under t, mosaic=1.0": "n-2"}
    assert train.title("n under t", {"lr0": "2e-3", "epochs": 4}) == "n under t, lr0=0.002"  # as of Ultralytics' runs


def test_pulls_are_medians_over_the_run(scripts, tmp_path) -> None:
    train, report = scripts
    file = tmp_path / "gradients.csv"
    rows = [(1, 2.0, 8.0), (2, 4.0, 8.0), (3, 1.0, 9.0)]  # norms of the task and of a term: ratios 4, 2, 9
    lines = ["iteration,term,value,norm,cosine,share"]
    for i, task, term in rows:
        lines += [f"{i},task,1,{task},1,0.5", f"{i},feat_loss,1,{term},{i / 10},0.{i}"]
    file.write_text("\n".join(lines) + "\n")
    found = train.pulls_of(file)
    assert found["pulls"]["feat_loss"] == {"over_task": 4, "cosine": 0.2, "share": 0.2}
    assert found["pulls"]["task"] == {"over_task": 1, "cosine": 1, "share": 0.5}
    assert train.pulls_of(tmp_path / "none.csv") == {}
    text = report.pulls([{"row": "GID", "epochs": 3, "seed": 0, **found}])
    assert text.splitlines()[-1].split()[1:-1:2] == ["GID", "3", "0", "feat_loss", "4", "0.2", "0.2"]


@pytest.mark.slow
def test_the_report_has_means_and_gains(scripts, project, tmp_path) -> None:
    train, report = scripts
    results = tmp_path / "accuracy.jsonl"
    train.collect(project, results)
    lines = report.read(results)
    for line in lines:  # numbers of which mean, deviation and gain are known
        for split in ("val", "train"):
            line[split]["mAP"] = {"teacher": 50.0, "plain": 30.0 + 2 * line["seed"], "GID": 33.0 + 4 * line["seed"]}[
                line["row"]
            ]
    text = report.table(lines, "val")
    # plain 30, 32: mean 31, deviation sqrt(2 x 1^2 / 1); GID 33, 37: mean 35, sqrt(2 x 2^2); gains 3 and 5: mean 4,
    # and Student's t of one degree of freedom 12.706 x sqrt(2) / sqrt(2)
    assert "31.0 ± 1.4" in text
    assert "35.0 ± 2.8, +4.0 [-8.7, +16.7]" in text
    assert "50.0" in text
    other = [{**line, "row": "own"} for line in lines if line["row"] == "plain"]
    over = report.table([*lines, *({**line, "kind": "distilled"} for line in other)], "val", over="own")
    assert "35.0 ± 2.8, +4.0 [-8.7, +16.7]" in over  # of the same numbers
    assert [row for row in over.splitlines() if "31.0 ± 1.4," in row] == []  # no gain of a row over itself
    report.plot(lines, ["plain", "GID"], "val", tmp_path / "schedules.png")
    report.plot_curves(lines, ["plain", "GID"], tmp_path / "curves.png")
    for name in ("schedules.png", "curves.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    with pytest.raises(SystemExit, match="plain, FitNet: there is no schedule"):
        report.plot_curves(lines, ["plain", "FitNet"], tmp_path / "none.png")


def test_at_equal_time_plain_has_at_least_as_long(scripts) -> None:
    _, report = scripts

    def line(row: str, epochs: int, seed: int, seconds: float, ap: float) -> dict:
        kind = "plain" if row == "plain" else "distilled"
        return {"row": row, "kind": kind, "epochs": epochs, "seed": seed, "seconds": seconds, "val": {"mAP": ap}}

    lines = [line("teacher", 9, 0, 60, 50) | {"kind": "teacher"}]
    lines += [line("plain", 10, 0, 60, 20), line("plain", 20, 0, 120, 30), line("plain", 40, 0, 240, 34)]
    lines += [line("plain", 20, 1, 126, 32)]
    lines += [line("GID", 10, 0, 122, 31), line("GID", 10, 1, 130, 34)]  # median 126; plain's, 123, is 0.976 of it
    lines += [line("GID", 40, 0, 480, 40)]  # twice what any plain run had
    lines += [line("other", 10, 5, 61, 40)]  # of a seed that plain has not
    rows = [
        [cell.strip() for cell in text.split("|")[1:-1]] for text in report.at_equal_time(lines, "val").splitlines()
    ]
    # 31 - 30 and 34 - 32: mean 1.5, deviation 1 / sqrt(2), Student's t 12.706 x (1 / sqrt(2)) / sqrt(2) = 6.4
    assert rows[2] == ["GID", "10", "2", "20", "2", "+1.5 [-4.9, +7.9]"]
    assert rows[3] == ["GID", "40", "8", "40", "4", "none so long"]
    assert rows[4] == ["other", "10", "1", "none of its seeds", "", ""]
    assert len(rows) == 5


def test_the_report_of_some_schedules_alone(scripts, tmp_path, monkeypatch, capsys) -> None:
    _, report = scripts
    results, common = tmp_path / "some.jsonl", {"data": "d", "models": "m", "seed": 0}
    lines = [{"row": "teacher", "kind": "teacher", "epochs": None, "test": {"mAP": 50.0}}]
    lines += [{"row": "plain", "kind": "plain", "epochs": n, "test": {"mAP": 20.0 + n}} for n in (1, 2, 3)]
    results.write_text("".join(json.dumps({**common, **line}) + "\n" for line in lines))
    monkeypatch.setattr("sys.argv", f"report --results {results} --epochs 1 3".split())
    report.main()
    rows = [[x.strip() for x in text.split("|")[1:-1]] for text in capsys.readouterr().out.splitlines() if "|" in text]
    assert rows[0] == ["", "1 epochs", "3 epochs"]
    assert rows[2:4] == [["teacher", "50.0", "50.0"], ["plain", "21.0", "23.0"]]
    monkeypatch.setattr("sys.argv", f"report --results {results} --epochs 4".split())
    with pytest.raises(SystemExit, match="has no student of these"):
        report.main()


def test_a_picture_of_several_pairs_is_refused(scripts, tmp_path, monkeypatch, capsys) -> None:
    _, report = scripts
    line = {"models": "s under t", "row": "plain", "kind": "plain", "seed": 0, "epochs": 4, "val": {"mAP": 10.0}}
    line |= {"test": {"mAP": 9.0}, "seconds": 60.0, "curve": [[1, 30.0, 5.0], [2, 60.0, 10.0]]}
    file, picture = tmp_path / "lines.jsonl", tmp_path / "curves.png"
    file.write_text("".join(json.dumps({**line, "data": data}) + "\n" for data in ("a.yaml", "b.yaml")))
    words = ["report.py", "--results", str(file), "--rows", "plain", "--curves", str(picture)]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit, match=r"give --data and --models, of 'a\.yaml' 's under t', 'b\.yaml' 's under t'"):
        report.main()
    assert not picture.exists()
    monkeypatch.setattr("sys.argv", [*words, "--data", "a.yaml"])
    report.main()
    assert picture.stat().st_size > 1000


def test_the_commands_of_the_page_are_read(scripts) -> None:
    train, _ = scripts
    text = (FOLDER.parents[1] / "docs" / "accuracy.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.split()[1:] for line in text.splitlines() if line.strip().startswith("$train ")]
    assert len(lines) > 10
    for words in lines:
        options = train.options_of(words)
        assert options.seeds
        assert set(options.more) | set(options.teacher_more) == {word for word in words if "=" in word}
        if "$study" not in str(options.study):
            assert (FOLDER.parents[1] / options.study).is_file()


def test_a_teacher_is_the_one_that_is_asked_for(scripts, tmp_path, monkeypatch) -> None:
    train, _ = scripts
    given: list[dict] = []
    monkeypatch.setattr(train, "command", lambda *_, **arguments: given.append(arguments))
    home = tmp_path / "teacher_retina"
    weights = home / "weights"
    with pytest.raises(SystemExit, match=r"teacher_retina is to be trained first: give --teacher-epochs"):
        train.train_teacher(home, "retina_small", {}, {"mosaic": "1.0"})
    assert train.train_teacher(home, "retina_small", {"cache": "ram"}, {"epochs": 3}) == weights / "best.pt"
    assert [(x["cache"], x["epochs"]) for x in given] == [("ram", 3)]
    weights.mkdir(parents=True)
    (weights / "last.pt").touch()
    (home / "coco_metrics.json").touch()
    with pytest.raises(SystemExit, match=r"teacher_retina has no args\.yaml"):
        train.train_teacher(home, "retina_small", {}, {})
    had = {"epochs": 3, "imgsz": 64, "lr0": 0.001, "backbone_weights": "/there/teacher_a/weights/best.pt"}
    (home / "args.yaml").write_text(yaml.safe_dump(had))
    same = {"imgsz": 64, "lr0": "1e-3", "backbone_weights": "/here/teacher_a/weights/best.pt"}
    for asked in (same, {}):
        train.train_teacher(home, "retina_small", {}, asked)
    assert len(given) == 1
    for asked, sentence in (
        ({"epochs": 60}, "epochs=3, not 60"),
        ({"imgsz": 32}, "imgsz=64, not 32"),
        ({"mosaic": "1.0"}, "mosaic=None, not 1.0"),
        ({"backbone_weights": "/there/teacher_b/weights/best.pt"}, "backbone_weights=.*, not /there/teacher_b"),
    ):
        with pytest.raises(SystemExit, match=f"teacher_retina has {sentence}.*: leave the option out"):
            train.train_teacher(home, "retina_small", {}, asked)


def test_ultralytics_runs_are_told_apart_by_all_they_are_trained_by(scripts, tmp_path) -> None:
    train, _ = scripts
    teachers = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for path in teachers:
        path.write_bytes(path.name.encode())
    first = {"data": tmp_path / "data.yaml", "imgsz": 64, "epochs": 2, "distill_model": teachers[0]}
    others = [first | {"imgsz": 32}, first | {"flipud": "0.5"}, first | {"distill_model": teachers[1]}]
    assert len({train.digest_of(x) for x in (first, *others)}) == 4
    moved = tmp_path / "moved.pt"
    moved.write_bytes(teachers[0].read_bytes())
    assert train.digest_of(first | {"distill_model": moved}) == train.digest_of(first)


@pytest.mark.slow
def test_ultralytics_own_distillation_stands_beside_ours(scripts, data, tmp_path, monkeypatch) -> None:
    train, report = scripts
    monkeypatch.setattr(train, "SPLITS", ("val",))
    study_file, results = tmp_path / "plain.yaml", tmp_path / "accuracy.jsonl"
    rows = [{"name": "teacher", "kind": "teacher"}, {"name": "plain", "kind": "plain"}]
    study_file.write_text(yaml.safe_dump({"title": "", "columns": ["mAP"], "groups": [{"name": "all", "rows": rows}]}))
    words = f"train --data {data} --kind yolo --study {study_file} --epochs 2 --seeds 3 --imgsz 64 --teacher-epochs 1 "
    words += f"--project {tmp_path / 'runs'} --results {results} batch=4 rect=False teacher_min_ap=0"
    monkeypatch.setattr("sys.argv", words.split())
    train.main()
    teacher, plain, own = sorted(report.read(results), key=lambda x: (x["kind"] != "teacher", x["kind"] != "plain"))
    assert [x["kind"] for x in (teacher, plain, own)] == ["teacher", "plain", "distilled"]
    assert own["row"] == train.ULTRALYTICS
    for key in ("data", "models", "epochs", "seed"):
        assert own[key] == plain[key]
    (folder,) = (tmp_path / "runs").glob(f"*/ultralytics/{own['run']}")
    began, twin = (
        yaml.safe_load((x / "args.yaml").read_text()) for x in (folder, folder.parents[1] / "runs" / plain["run"])
    )
    apart = {key for key in began if key in twin and began[key] != twin[key]}
    assert apart == {"distill_model", "name", "project", "save_dir"}  # what is not of the place is alike
    assert began["distill_model"].endswith("best.pt")
    header = (folder / "results.csv").read_text().splitlines()[0]
    assert "train/dis_loss" in header
    measured = json.loads((folder.with_name(f"{folder.name}-val") / "coco_metrics.json").read_text())
    assert own["val"]["mAP"] == measured["mAP"]
    assert len(own["curve"]) == 2
    assert teacher["args"]["epochs"] == 1 == len(teacher["curve"])  # how it was trained
    assert not any("/" in str(x) for x in teacher["args"].values())
    before = results.read_text()
    train.main()  # finds everything done
    assert results.read_text() == before
