"""Where a teacher comes from: a file, a finished run on the same data, or a run of its own first."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOCAL_RANK, LOGGER, SETTINGS

from gid_yolo.cfg import load_yaml, model_names
from gid_yolo.engine.allocations import built_from
from gid_yolo.engine.checkpoint import is_checkpoint, load_model
from gid_yolo.engine.classes import SharedClasses, check_classes, match_classes
from gid_yolo.engine.config import DEFAULTS
from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.engine.origin import shared_tensors
from gid_yolo.errors import UserError, some

# What a teacher that is trained first takes over from the student's run
CARRIED = (
    *("imgsz", "batch", "seed", "deterministic"),
    *("device", "workers", "cache", "amp", "project", "plots", "verbose", "single_cls"),
)


def loaded_share(teacher: DetectionModel) -> tuple[int, int]:
    """How many of the tensors that the teacher's settings call for its checkpoint holds with the right shape."""
    with built_from(teacher, f"teacher={getattr(teacher, 'pt_path', '')}"):
        fresh = type(teacher)(teacher.yaml, nc=len(teacher.names), verbose=False)
    return shared_tensors(teacher, fresh)


def share_classes(
    teacher: dict[int, str], student: dict[int, str], classes: Sequence[int] | None = None
) -> SharedClasses | None:
    """The classes two models share, by name; in their order where the teacher's have no names.

    Args:
        teacher: Names of the teacher's classes.
        student: Names of the student's.
        classes: The student's classes that are trained; all of them where None.

    Returns:
        The shared classes, or None where they are all of both, in the same order.

    Raises:
        UserError: They share none, or `classes` are not the student's.
    """
    check_classes(classes, student)
    if list(teacher.values()) == list(student.values()) and classes is None:
        return None
    index = match_classes(teacher, student, "teacher")
    trained = list(student) if classes is None else [i for i in student if i in set(classes)]
    shared = [i for i in trained if i in index]
    if not shared:
        raise UserError(
            f"the teacher knows {len(teacher)} classes ({some(teacher.values())}) but none of the {len(trained)} that "
            f"are trained ({some(student[i] for i in trained)}): use a teacher of these classes, or rename them in the "
            "data yaml."
        )
    if missing := [student[i] for i in trained if i not in index]:
        LOGGER.warning(
            f"the teacher does not know {some(missing)} of the {len(trained)} classes that are trained: the scores of "
            f"the {len(shared)} shared ones are compared, the rest learns from the data alone."
        )
    return SharedClasses(shared, [index[i] for i in shared])


def resolve_teacher(teacher: str | Path, data: str | Path, args: dict[str, Any]) -> Path:
    """Path of the teacher's checkpoint; a name is looked up, and trained first where nothing is found.

    Args:
        teacher: A file of weights, or a model name.
        data: Path of the data yaml.
        args: Arguments of the student's run; a teacher that must be trained takes over those that define the budget.

    Raises:
        UserError: Neither a file nor a known model.
    """
    path, epochs = Path(teacher), args.get("teacher_epochs")
    if is_checkpoint(path):
        _tell_idle(epochs, "the teacher is a file")
        found = load_model(path, "teacher", args.get("trust", False))[0].pt_path  # fail before anything is trained
        return Path(found).resolve()
    name = str(teacher)
    check_teacher_name(name)
    local = Path(f"{name}.pt")
    if local.is_file():
        LOGGER.info(f"teacher={name}: found {local.resolve()}")
        _tell_idle(epochs, "the teacher is there")
        load_model(local, "teacher", args.get("trust", False))
        return local.resolve()
    if found := find_finished_run(name, data, args):
        _tell_idle(epochs, f"the teacher is there; for another, gid-train model={name}, and give its best.pt")
        return found
    return train_teacher(name, data, args)


def _tell_idle(epochs: Any, why: str) -> None:
    if epochs is not None:
        LOGGER.warning(f"teacher_epochs={epochs} does nothing: {why}.")


def check_teacher_name(name: str) -> None:
    """Refuse a `teacher=` that is no file of weights and no model to look up or to train.

    Raises:
        UserError: It is neither.
    """
    if name not in model_names():
        raise UserError(
            f"teacher={name} is neither a file of weights (.pt, .pth, .pkl) nor a known model "
            f"({', '.join(model_names())})."
        )


def find_finished_run(name: str, data: str | Path, args: Mapping[str, Any]) -> Path | None:
    """The best.pt of the most accurate finished plain run of model `name` on `data`, or None; see `finished_runs`.

    Args:
        name: Of a model.
        data: Path of the data yaml.
        args: Of the student's run, `project` and `teacher_min_ap` among them.

    Raises:
        UserError: It has nothing to teach. A run of the same length would hardly have more.
    """
    found = best_finished_run(name, data, args.get("project"), single_cls=bool(args.get("single_cls")))
    if found is None:
        return None
    ap, best = found
    length = load_yaml(best.parents[1] / "args.yaml")
    steps = f"{length['iterations']} iterations" if length.get("iterations") else f"{length.get('epochs')} epochs"
    said = f"a finished run on the same data (mAP {ap:.1f}, {steps} at {length.get('imgsz')} px), {best}"
    least = DEFAULTS["teacher_min_ap"] if args.get("teacher_min_ap") is None else args["teacher_min_ap"]
    if ap < least:
        raise UserError(
            f"teacher={name}: the best there is, {said}, is under teacher_min_ap={least}: train a better one, "
            f"gid-train model={name} data={data}, which is then found, or set teacher_min_ap=0."
        )
    LOGGER.info(f"teacher={name}: found {said}")
    return best.resolve()


def best_finished_run(
    name: str,
    data: str | Path,
    project: str | Path | None = None,
    *,
    single_cls: bool = False,
    usable: Callable[[Path], bool] = lambda best: True,
) -> tuple[float, Path] | None:
    """Validation mAP in percent and best.pt of the most accurate finished plain run of model `name` on `data`.

    Of those whose best.pt is `usable`; the others are as `finished_runs` finds them.
    """
    runs = []
    for best in filter(usable, finished_runs(name, data, project, single_cls=single_cls)):
        with suppress(OSError, ValueError):  # another run's file, which may be damaged
            ap = load_yaml(best.parents[1] / "coco_metrics.json").get("mAP")  # JSON is yaml
            runs += [(float(ap), best)] if isinstance(ap, int | float) else []
    return max(runs) if runs else None


def finished_runs(
    name: str, data: str | Path, project: str | Path | None = None, *, single_cls: bool = False
) -> list[Path]:
    """The best.pt of every finished plain run of model `name` on `data`, of all classes as one where `single_cls`.

    Ultralytics' runs folder is searched, and `project` where it is a folder of its own. A run is finished when its
    final evaluation was written, which is the last thing training does.
    """
    folders = _plain_runs(name, data, project, single_cls)
    runs = [folder / "weights" / "best.pt" for folder in folders if (folder / "coco_metrics.json").is_file()]
    return [best for best in runs if best.is_file()]


def _plain_runs(name: str, data: str | Path, project: str | Path | None, single_cls: bool) -> list[Path]:
    """The folders of all plain runs of model `name` on `data`, finished or not."""
    runs = []
    roots = [Path(SETTINGS["runs_dir"]) / "detect", *([Path(project)] if project else [])]
    for file in {file.resolve() for root in roots for file in root.glob("**/args.yaml")}:
        try:
            args = load_yaml(file)
        except (OSError, ValueError):  # another run's, which may be damaged
            continue
        same_data = args.get("data") and Path(str(args["data"])).resolve() == Path(data).resolve()
        other = any(args.get(key) for key in ("teacher", "backbone", "classes"))  # another model or data
        other = other or bool(args.get("single_cls")) != single_cls
        if args.get("model") == name and same_data and not other and args.get("fraction") in (None, 1.0):
            runs.append(file.parent)
    return runs


def teacher_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of a student's run that a teacher trained for it takes over."""
    carried = {key: args[key] for key in CARRIED if args.get(key) is not None}
    length = {"epochs": args.get("epochs" if args.get("teacher_epochs") is None else "teacher_epochs")}
    if args.get("teacher_epochs") is None and args.get("iterations") is not None:
        length = {"iterations": args["iterations"]}
    return carried | {key: value for key, value in length.items() if value is not None}


def train_teacher(name: str, data: str | Path, args: dict[str, Any]) -> Path:
    """Train model `name` plainly on `data`, announced with what it takes; the run is found again next time.

    Raises:
        UserError: This is one of several processes, which can train one model only.
    """
    from gid_yolo.engine.trainer import GIDTrainer  # the trainer itself needs this module

    if LOCAL_RANK != -1:
        raise UserError(
            f"teacher={name}: there is no {name}.pt here and no finished run on {data}, and processes that a launcher "
            f"started train one model only: train it first, gid-train model={name} data={data}, and give its best.pt."
        )
    overrides = teacher_args(args)
    overrides.update(
        model=name, data=str(data), task="detect", mode="train", name=f"teacher_{name}_{Path(data).parent.name}"
    )
    stopped = _stopped_run(name, data, args)  # before this one lies beside it
    trainer = GIDTrainer(overrides=overrides)
    images = len(image_files(trainer.data["train"]))
    seen, length = trainer.epochs * images, f"{trainer.epochs} epochs of {images} images"
    if iterations := trainer.args.iterations:
        seen, length = iterations * trainer.args.batch, f"{iterations} iterations of {trainer.args.batch} images"
    try:
        with torch.random.fork_rng(devices=[]):  # the teacher draws its weights after this
            seconds = seconds_per_image(name, trainer.args.imgsz, trainer.device)
        takes = f"about {duration(seen * seconds)}"
    except torch.OutOfMemoryError:  # in float32, which the training need not be in
        takes = "in a time that could not be measured (too little memory)"
    torch.cuda.empty_cache()  # which the processes of a launcher would lack
    LOGGER.info(
        f"\nteacher={name}: there is no {name}.pt here and no finished run on {data}, so it is trained first.\n"
        f"  {length} at {trainer.args.imgsz} px on {trainer.device}: {takes}, "
        f"then it is kept as {trainer.best} and found again next time.\n"
        "  Give teacher=FILE.pt to use a teacher of your own, teacher_epochs=N to train it for longer or shorter.\n"
    )
    if stopped:
        LOGGER.warning(
            f"such a run is not at its end: unless a process is at it, gid-train resume=True model={stopped} goes on."
        )
    trainer.train()
    return trainer.best.resolve()


def _stopped_run(name: str, data: str | Path, args: Mapping[str, Any]) -> Path | None:
    """The newest last.pt of such runs that are not finished; another process may be at it, so nobody else goes on."""
    folders = _plain_runs(name, data, args.get("project"), bool(args.get("single_cls")))
    files = [x / "weights" / "last.pt" for x in folders if not (x / "coco_metrics.json").is_file()]
    return max((file for file in files if file.is_file()), key=lambda file: file.stat().st_mtime, default=None)


def seconds_per_image(name: str, imgsz: int, device: torch.device, batch: int = 2) -> float:
    """Time of a training step a image, from one forward and backward pass after a warm-up."""
    model = GIDDetectionModel(name, verbose=False).to(device).train()
    images = torch.rand(batch, 3, imgsz, imgsz, device=device)
    for _ in range(2):
        start = time.perf_counter()
        _, raw = model.raw(images)
        (raw.logits.mean() + raw.regression.mean()).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / batch


def duration(seconds: float) -> str:
    """A time for a message, in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def image_files(split: Any) -> list[Path]:
    """Image files of a data split: a folder, a list file, whose `./` is its own folder, or a list of them."""
    from ultralytics.data.utils import IMG_FORMATS

    files: list[Path] = []
    for part in split if isinstance(split, list) else [split]:
        path = Path(part)
        if path.is_file():
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            files += [path.parent / line if line.startswith("./") else Path(line) for line in lines]
        else:
            files += path.rglob("*")
    return [file for file in files if file.suffix[1:].lower() in IMG_FORMATS]
