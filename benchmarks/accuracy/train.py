r"""Train teacher, plain and distilled students at several schedules, and keep every result: the proof of accuracy.

    python benchmarks/accuracy/train.py --data bccd.yaml --imgsz 320 --kind retina --epochs 20 40 80 --seeds 0 1 2 \
        --teacher-weights lite2.safetensors --teacher-epochs 60
    python benchmarks/accuracy/report.py

A schedule is a `gid-study` of its own over the rows of `--study`: in one seed, all rows have the same first weights and
see the same images in the same order (Ultralytics' own distillation, which stands beside them for YOLO, starts from the
same weights and draws its own order and augmentations). Results of both splits, the curve of the validation mAP and all
arguments go to `benchmarks/results/accuracy.jsonl`, a line for each run; pairs of another learning rate (`lr0=`) or
with mosaic are told apart by it. The same command goes on with what was interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import ultralytics
import yaml

from gid_yolo.analysis.study_plan import OF_EVALUATION, OF_WEIGHTS
from gid_yolo.cli import parse
from gid_yolo.engine.config import OWN_KEYS
from gid_yolo.engine.curves import read_curve
from gid_yolo.engine.gradients import read_gradients

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
RESULTS = HERE.parent / "results" / "accuracy.jsonl"
SPLITS = ("val", "test")
ENVIRONMENT = {**os.environ, "YOLO_AUTOINSTALL": "False", "YOLO_OFFLINE": "True"}
PAIRS = {kind: (f"{kind}_small", f"{kind}_nano") for kind in ("retina", "fcos", "frcnn")}
PAIRS["yolo"] = "yolo11s.yaml", "yolo11n.yaml"
RECIPE = ("lr0", "mosaic")  # arguments of students that their pair's title has
SCHEDULE = {"iterations", "lr_steps", "warmup_iterations", "recipe"}  # arguments that Ultralytics has not
FILES = {"model", "data", "teacher", *OF_WEIGHTS}  # of which a line keeps the name alone
ULTRALYTICS = "Ultralytics' distill_model"  # the row of its own distillation, of YOLO alone


def command(program: str, *words: str, **arguments: Any) -> None:
    """Run `<program> key=value ...`; a failure ends the script."""
    line = [program, *words, *(f"{key}={value}" for key, value in arguments.items())]
    print(f"\n$ {' '.join(line)}", flush=True)
    if not (BIN / line[0]).is_file():
        sys.exit(f"{BIN / line[0]} is missing: install the project in the environment of {sys.executable}.")
    if code := subprocess.run([str(BIN / line[0]), *line[1:]], env=ENVIRONMENT, check=False).returncode:
        sys.exit(code)


def train_teacher(home: Path, model: str, arguments: dict[str, Any], asked: dict[str, Any]) -> Path:
    """The best checkpoint of a teacher that was trained to its end, now or before.

    Args:
        home: Of its run.
        model: Its name, or a yaml.
        arguments: Of the run, which one that is there may have otherwise.
        asked: Likewise, which it must have.
    """
    best, last = home / "weights" / "best.pt", home / "weights" / "last.pt"
    if last.is_file():
        check_teacher(home, asked)
    elif "epochs" not in asked:
        sys.exit(f"{home} is to be trained first: give --teacher-epochs, and how in --teacher-weights and -more.")
    if not (home / "coco_metrics.json").is_file():
        if last.is_file():
            command("gid-train", "resume=True", model=last)
        else:
            place = {"project": home.parent.resolve(), "name": home.name, "exist_ok": True}
            command("gid-train", model=model, plots=False, patience=0, **place, **arguments, **asked)
    return best


def check_teacher(home: Path, asked: dict[str, Any]) -> None:
    """Stop where the teacher that is there was trained otherwise."""
    if not (home / "args.yaml").is_file():
        sys.exit(f"{home} has no args.yaml, which says how it was trained: remove it, or give another --project.")
    had = yaml.safe_load((home / "args.yaml").read_text(encoding="utf-8"))
    for key, value in asked.items():
        wanted = parse([f"{key}={value}"])[key]
        named = key == "backbone_weights" and file_name(had.get(key)) == file_name(wanted)
        if had.get(key) != wanted and not named:
            sys.exit(f"{home} has {key}={had.get(key)}, not {wanted}: leave the option out, or give another --project.")


def file_name(path: Any) -> tuple[str, ...]:
    """What a file is known by, wherever it lies; a run's checkpoint with the run."""
    parts = Path(str(path)).parts
    return parts[-3:] if parts[-1:] == ("best.pt",) else parts[-1:]


def collect(project: Path, results: Path = RESULTS, more: Sequence[dict[str, Any]] = ()) -> int:
    """Write a line for each finished run of the studies in a folder, in place of an older one of the same run.

    Args:
        project: The folder.
        results: The file.
        more: Lines besides.

    Returns:
        How many lines the file has.
    """
    lines = {}
    if results.is_file():
        lines = {_key(line): line for line in map(json.loads, results.read_text(encoding="utf-8").splitlines())}
    studies = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(project.glob("*.json"))]
    found = [line for study in studies for line in _runs(study, project / "runs")]
    for line in [*found, *more]:
        lines[_key(line)] = {**lines.get(_key(line), {}), **line}
    ordered = sorted(lines.values(), key=lambda x: (x["data"], x["models"], x["epochs"] or 0, x["row"], x["seed"]))
    results.parent.mkdir(exist_ok=True)
    results.write_text("".join(json.dumps(line) + "\n" for line in ordered), encoding="utf-8")
    return len(ordered)


def _key(line: dict[str, Any]) -> tuple[str, str]:
    """A run, of the models it was compared with: a teacher may have several students."""
    return line["models"], line["run"]


def _runs(study: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    """The line of every run of a study that has results."""
    settings = study["settings"]
    models = title("; ".join(settings["models"].values()), settings["arguments"])
    common = {"data": name_of(Path(settings["data"])), "models": models}
    for row in study["rows"]:
        for seed, run in row["runs"].items():
            if run["results"] is None:
                continue
            args = {key: Path(x).name if key in FILES and isinstance(x, str) else x for key, x in run["args"].items()}
            kind, name = ("plain", "plain") if row["kind"] == "longer" else (row["kind"], row["name"])
            found = {**common, "row": name, "kind": kind, "seed": int(seed), "run": run["run"]}
            found |= {"epochs": args.get("epochs"), settings["split"]: run["results"], "args": args}
            if kind == "teacher":  # whose run the study only measured
                yield found | trained(folder.parent / settings["models"][row["group"]].split(" under ")[-1])
            else:
                yield found | _history(folder / run["run"])


def title(models: str, arguments: dict[str, Any]) -> str:
    """What a line calls its pair: the models, and what students were trained by that pairs are told apart by."""
    told = parse([f"{key}={arguments[key]}" for key in RECIPE if key in arguments])
    return models + "".join(f", {key}={value}" for key, value in told.items())


def trained(home: Path) -> dict[str, Any]:
    """How a teacher was trained, where its run lies in the project."""
    if not (home / "args.yaml").is_file():
        return {}
    given = yaml.safe_load((home / "args.yaml").read_text(encoding="utf-8")).items()
    args = {key: Path(x).name if isinstance(x, str) else x for key, x in given if x is not None}
    left_out = {"project", "name", "save_dir", "exist_ok"}
    return {**_history(home), "args": {key: x for key, x in args.items() if key not in left_out}}


def name_of(data: Path) -> str:
    """The data set's: of the embedded one, its version."""
    return data.parent.name if data.stem == "data" else data.name


def _history(home: Path) -> dict[str, Any]:
    """What a run's folder says of its training: the curve (epoch, seconds, mAP), the machine, versions, the commit."""
    if not (home / "results.csv").is_file():
        return {}
    record = json.loads((home / "run.json").read_text(encoding="utf-8"))
    start = record["starts"][0]
    told = {key: start.get(key) for key in ("date", "cpu", "device", "threads", "versions", "teacher")}
    if told["teacher"]:
        told["teacher"] = {**told["teacher"], "path": Path(told["teacher"]["path"]).name}  # no path of this machine
    told |= pulls_of(home / "gradients.csv")
    return {**curve_of(home / "results.csv"), "commit": start["git"]["gid_yolo"], **told}


def curve_of(file: Path) -> dict[str, Any]:
    """The curve, (epoch, seconds, mAP), and the seconds in all; nothing where there is no file."""
    if not file.is_file():
        return {}
    curve = [list(point) for point in read_curve(file)]
    return {"curve": curve, "seconds": curve[-1][1]}


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


def pairs_of(words: Sequence[str]) -> dict[str, str]:
    """The words `key=value` by key."""
    return dict(word.split("=", 1) for word in words)


def digest_of(arguments: dict[str, Any]) -> str:
    """Of all that a run of Ultralytics is trained by, its teacher's file and data among it."""
    telling = {**arguments, "data": str(arguments["data"])}
    telling["distill_model"] = hashlib.sha256(Path(arguments["distill_model"]).read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(telling, sort_keys=True).encode()).hexdigest()[:8]


def by_ultralytics(home: Path, student: str, arguments: dict[str, Any]) -> dict[str, dict[str, float]]:
    """A YOLO student under `distill_model=`, by Ultralytics' own program: the ten columns of every split.

    Trained by the arguments of the study's runs, and measured by `gid-val` as they are.
    """
    best, last = home / "weights" / "best.pt", home / "weights" / "last.pt"
    place = {"project": home.parent, "name": home.name, "exist_ok": True}
    found = {}
    for split in SPLITS:
        measured = home.with_name(f"{home.name}-{split}")
        file = measured / "coco_metrics.json"
        if not file.is_file():
            if not (home / "finished").is_file():
                if len(curve_of(home / "results.csv").get("curve", ())) >= int(arguments["epochs"]):
                    sys.exit(f"{home} was stopped in its final evaluation: remove it, so that it is trained anew.")
                if last.is_file():
                    command("yolo", "detect", "train", "resume=True", model=last)
                else:
                    command("yolo", "detect", "train", model=student, plots=False, patience=0, **place, **arguments)
                (home / "finished").touch()  # nothing that Ultralytics writes says so
            asked = {key: arguments[key] for key in ("data", *OF_EVALUATION) if key in arguments}
            there = {"project": measured.parent, "name": measured.name, "exist_ok": True}
            command("gid-val", model=best, split=split, plots=False, **asked, **there)
        values = json.loads(file.read_text(encoding="utf-8"))
        found[split] = {key: value for key, value in values.items() if key not in {"split", "images"}}
    return found


def ultralytics_line(
    home: Path, models: str, results: dict[str, dict[str, float]], arguments: dict[str, Any]
) -> dict[str, Any]:
    """The line of such a run in the file of results."""
    args = {key: Path(x).name if key in {"data", "distill_model"} else x for key, x in arguments.items()}
    found = {"data": name_of(Path(arguments["data"])), "models": models, "row": ULTRALYTICS, "kind": "distilled"}
    found |= {"seed": args["seed"], "run": home.name, "epochs": args["epochs"], **results, "args": args}
    return found | curve_of(home / "results.csv") | {"versions": {"ultralytics": ultralytics.__version__}}


def options_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line, this process's where None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a data yaml with the splits train, val and test")
    parser.add_argument("--kind", choices=tuple(PAIRS), default="retina")
    parser.add_argument("--study", type=Path, default=HERE / "methods.yaml")
    parser.add_argument("--epochs", type=int, nargs="+", default=[20, 40, 80])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--teacher", default=None, help="another teacher of the kind: a yaml")
    parser.add_argument("--teacher-epochs", type=int, default=None, help="needed where it is not trained yet")
    parser.add_argument("--teacher-weights", default=None, help="ImageNet weights of its backbone, timm's keys")
    parser.add_argument("--teacher-more", nargs="*", default=[], help="other arguments of gid-train for the teacher")
    parser.add_argument("--student", default=None, help="another student of the kind: a yaml")
    parser.add_argument("--student-weights", default=None, help="of its backbone; random without it")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--project", type=Path, default=Path("runs") / "accuracy")
    parser.add_argument("--results", type=Path, default=RESULTS)
    more = "other arguments of gid-train, key=value, for every student; not right after --epochs or --seeds"
    parser.add_argument("more", nargs="*", help=more)
    return parser.parse_args(words)


def main() -> None:
    """Train what is missing, evaluate it on both splits, keep the results."""
    options = options_of()
    project = (options.project / Path(name_of(options.data)).stem).resolve()
    every = {"data": options.data.resolve(), "imgsz": options.imgsz, "rect": True, "cache": "ram"}
    home = project / f"teacher_{Path(options.teacher).stem if options.teacher else options.kind}"
    asked: dict[str, Any] = {"imgsz": options.imgsz}
    if options.teacher_epochs:
        asked["epochs"] = options.teacher_epochs
    if options.teacher_weights:
        asked["backbone_weights"] = options.teacher_weights
    elif options.kind != "yolo" and not (home / "weights" / "last.pt").is_file():
        asked["backbone_weights"] = True  # timm's are downloaded; YOLO has none to begin with
    asked |= pairs_of(options.teacher_more)
    teaching = {key: value for key, value in {**every, "workers": 0}.items() if key not in asked}
    large, small = PAIRS[options.kind]
    small = options.student or small
    teacher = train_teacher(home, options.teacher or large, teaching, asked)
    given = pairs_of(options.more)
    if options.student_weights:
        given["backbone_weights"] = options.student_weights
    common = {**every, "workers": 0, **given}
    if options.kind == "yolo" and (ours := sorted(SCHEDULE & set(common))):
        sys.exit(f"{ours[0]}= is not Ultralytics': its own distillation could not be trained by it; leave it out.")
    for epochs in options.epochs:
        for split in SPLITS:
            seeds, jobs = str(options.seeds).replace(" ", ""), options.jobs
            pair, place = {"model": small, "teacher": teacher}, {"project": project, "split": split, "jobs": jobs}
            command("gid-study", str(options.study), **pair, epochs=epochs, seeds=seeds, **place, **common)
            print(f"{options.results}: {collect(project, options.results)} runs")
        for seed in options.seeds if options.kind == "yolo" else ():
            arguments = {key: value for key, value in common.items() if key not in OWN_KEYS}
            arguments |= {"epochs": epochs, "seed": seed, "distill_model": teacher}
            folder = project / "ultralytics" / f"{Path(small).stem}-{epochs}-seed{seed}-{digest_of(arguments)}"
            results = by_ultralytics(folder, small, arguments)
            models = title(f"{Path(small).stem} under {home.name}", arguments)
            line = ultralytics_line(folder, models, results, arguments)
            print(f"{options.results}: {collect(project, options.results, [line])} runs")


if __name__ == "__main__":
    main()
