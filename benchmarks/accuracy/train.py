r"""Train teacher, plain and distilled students at several schedules, and keep every result: the proof of accuracy.

    python benchmarks/accuracy/train.py --data bccd.yaml --imgsz 320 --kind retina --epochs 20 40 80 --seeds 0 1 2 \
        --teacher-weights lite2.safetensors --teacher-epochs 60
    python benchmarks/accuracy/report.py

A schedule is a `gid-study` of its own over the rows of `--study`: in one seed, all rows have the same first weights and
see the same images in the same order. Results of both splits, the curve of the validation mAP and all arguments go to
`benchmarks/results/accuracy.jsonl`, a line for each run. The same command goes on with what was interrupted.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from gid_yolo.engine.gradients import read_gradients

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
RESULTS = HERE.parent / "results" / "accuracy.jsonl"
SPLITS = ("val", "test")
ENVIRONMENT = {**os.environ, "YOLO_AUTOINSTALL": "False", "YOLO_OFFLINE": "True"}


def command(mode: str, *words: str, **arguments: Any) -> None:
    """Run `gid-<mode> key=value ...`; a failure ends the script."""
    line = [f"gid-{mode}", *words, *(f"{key}={value}" for key, value in arguments.items())]
    print(f"\n$ {' '.join(line)}", flush=True)
    if code := subprocess.run([str(BIN / line[0]), *line[1:]], env=ENVIRONMENT, check=False).returncode:
        sys.exit(code)


def train_teacher(home: Path, model: str, arguments: dict[str, Any]) -> Path:
    """The best checkpoint of a teacher that was trained to its end."""
    best, last = home / "weights" / "best.pt", home / "weights" / "last.pt"
    if not (home / "coco_metrics.json").is_file():
        if last.is_file():
            command("train", "resume=True", model=last)
        else:
            place = {"project": home.parent.resolve(), "name": home.name, "exist_ok": True}
            command("train", model=model, plots=False, patience=0, **place, **arguments)
    return best


def collect(project: Path, results: Path = RESULTS) -> int:
    """Write a line for each finished run of the studies in a folder, in place of an older one of the same run.

    Returns:
        How many lines the file has.
    """
    lines = {}
    if results.is_file():
        lines = {line["run"]: line for line in map(json.loads, results.read_text(encoding="utf-8").splitlines())}
    for file in sorted(project.glob("*.json")):
        study = json.loads(file.read_text(encoding="utf-8"))
        for name, found in _runs(study, project / "runs"):
            lines[name] = {**lines.get(name, {}), **found}
    ordered = sorted(lines.values(), key=lambda x: (x["data"], x["models"], x["epochs"] or 0, x["row"], x["seed"]))
    results.parent.mkdir(exist_ok=True)
    results.write_text("".join(json.dumps(line) + "\n" for line in ordered), encoding="utf-8")
    return len(ordered)


def _runs(study: dict[str, Any], folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and line of every run of a study that has results."""
    settings = study["settings"]
    data = Path(settings["data"])
    name = data.parent.name if data.stem == "data" else data.name  # of the embedded set, its version
    common = {"data": name, "models": "; ".join(settings["models"].values())}
    for row in study["rows"]:
        for seed, run in row["runs"].items():
            if run["results"] is None:
                continue
            args = {key: Path(x).name if key in {"data", "teacher"} else x for key, x in run["args"].items()}
            found = {**common, "row": row["name"], "kind": row["kind"], "seed": int(seed), "run": run["run"]}
            found |= {"epochs": args.get("epochs"), settings["split"]: run["results"], "args": args}
            yield run["run"], found | _history(folder / run["run"])


def _history(home: Path) -> dict[str, Any]:
    """What a run's folder says of its training: the curve (epoch, seconds, mAP), the machine, versions, the commit."""
    if not (home / "results.csv").is_file():
        return {}
    with (home / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    times = elapsed([float(row["time"]) for row in rows])
    aps = [round(100 * float(row["metrics/mAP50-95(B)"]), 2) for row in rows]
    curve = [[int(row["epoch"]), *rest] for row, *rest in zip(rows, times, aps, strict=True)]
    record = json.loads((home / "run.json").read_text(encoding="utf-8"))
    start = record["starts"][0]
    told = {key: start.get(key) for key in ("date", "cpu", "device", "threads", "versions", "teacher")}
    told |= pulls_of(home / "gradients.csv")
    return {"curve": curve, "seconds": curve[-1][1], "commit": start["git"]["gid_yolo"], **told}


def pulls_of(file: Path) -> dict[str, Any]:
    """Of every term the medians over a run of what `gradients=N` notes: its gradient over the task's, cosine, share."""
    rows = read_gradients(file)
    task = {iteration: norm for iteration, term, _, norm, *_ in rows if term == "task"}
    found: dict[str, Any] = {}
    for name in dict.fromkeys(term for _, term, *_ in rows):
        own = [(norm / task[i], cosine, share) for i, term, _, norm, cosine, share in rows if term == name]
        found[name] = {
            key: float(f"{median(values):.4g}")
            for key, values in zip(("over_task", "cosine", "share"), zip(*own, strict=True), strict=True)
        }
    return {"pulls": found} if found else {}


def elapsed(times: list[float]) -> list[float]:
    """Seconds since a run began, of a clock that starts anew whenever the run is resumed."""
    found, before, last = [], 0.0, 0.0
    for time in times:
        if time < last:
            before += last
        found.append(round(before + time, 1))
        last = time
    return found


def main() -> None:
    """Train what is missing, evaluate it on both splits, keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a data yaml with the splits train, val and test")
    parser.add_argument("--kind", choices=("retina", "fcos", "frcnn"), default="retina")
    parser.add_argument("--study", type=Path, default=HERE / "methods.yaml")
    parser.add_argument("--epochs", type=int, nargs="+", default=[20, 40, 80])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--teacher-epochs", type=int, default=60)
    parser.add_argument("--teacher-weights", default=True, help="ImageNet weights of its backbone, timm's keys")
    parser.add_argument("--student-weights", default=None, help="likewise; random without it")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--project", type=Path, default=Path("runs") / "accuracy")
    parser.add_argument("more", nargs="*", help="other arguments of gid-train, key=value, for every student")
    options = parser.parse_args()
    project = (options.project / options.data.stem).resolve()
    every = {"data": options.data.resolve(), "imgsz": options.imgsz, "rect": True, "cache": "ram"}
    teaching = {"epochs": options.teacher_epochs, "backbone_weights": options.teacher_weights, "workers": 0}
    home = project / f"teacher_{options.kind}"
    teacher = train_teacher(home, f"{options.kind}_small", {**every, **teaching})
    given = dict(word.split("=", 1) for word in options.more)
    if options.student_weights:
        given["backbone_weights"] = options.student_weights
    for epochs in options.epochs:
        for split in SPLITS:
            command(
                "study", str(options.study), model=f"{options.kind}_nano", teacher=teacher, epochs=epochs,
                seeds=str(options.seeds).replace(" ", ""), jobs=options.jobs, project=project, workers=0,
                split=split, **every, **given,
            )  # fmt: skip
            print(f"{RESULTS}: {collect(project)} runs")


if __name__ == "__main__":
    main()
