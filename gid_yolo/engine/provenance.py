"""What a run was made of: versions, commits, and digests of teacher and data, in `run.json` of its folder."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ultralytics.utils import LOGGER, YAML
from ultralytics.utils.git import GitRepo
from ultralytics.utils.torch_utils import get_cpu_info, get_gpu_info, unwrap_model

from gid_yolo._version import __version__
from gid_yolo.cfg import load_yaml
from gid_yolo.data.convert import CONVERTED_FROM
from gid_yolo.engine.rebuild import plain
from gid_yolo.engine.side_files import read_or_set_aside
from gid_yolo.errors import UserError
from gid_yolo.files import replaced

PACKAGES = ("torch", "torchvision", "ultralytics", "timm", "numpy", "opencv-python", "pycocotools")
CHOOSING = ("classes", "single_cls", "fraction")  # arguments that choose parts of the data
_GIT_SECONDS = 10


def digest_of_labels(labels: Sequence[Mapping[str, Any]], names: Mapping[int, str], *, in_order: bool = True) -> str:
    """The first 16 digits of the SHA-256 of a split: its images by name, their boxes and classes.

    The folder that holds all images does not count, so that a copy elsewhere has the same digest; neither do pixels.

    Args:
        labels: Ultralytics' labels: `im_file`, `cls` (M, 1), `bboxes` (M, 4) xywh and, where there are any, `segments`,
            M polygons (K, 2), all as parts of the image.
        names: Of the classes.
        in_order: The order of the images counts. Ultralytics sorts them by their shapes for rectangular batches, and
            equal ones as the machine's NumPy happens to.
    """
    digest = hashlib.sha256(repr(sorted(names.items())).encode())
    files = [Path(label["im_file"]).absolute() for label in labels]  # not resolved: that asks the disk for each
    root = Path(os.path.commonpath([file.parent for file in files])) if files else Path()
    pairs = list(zip(files, labels, strict=True))
    for file, label in pairs if in_order else sorted(pairs, key=lambda pair: pair[0]):
        digest.update(os.fsencode(file.relative_to(root).as_posix()) + b"\0")
        digest.update(np.asarray(label["cls"], np.int64).tobytes())
        digest.update(np.asarray(label["bboxes"], np.float32).tobytes() + b"\n")
        for polygon in label.get("segments", ()):  # which augmentation makes boxes of
            digest.update(np.asarray(polygon, np.float32).tobytes() + b"\n")
    return digest.hexdigest()[:16]


def digest_of_file(path: Path) -> str | None:
    """The SHA-256 of a file; None where there is none."""
    if not path.is_file():
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def commit_of(place: Path) -> dict[str, Any] | None:
    """The commit of the repository that a folder lies in, and whether tracked files differ from it (None: unknown).

    Of a file, the repository that tracks it: one around an environment with installed packages does not.
    """
    repository = GitRepo(place)
    if not repository.is_repo or not repository.commit:
        return None
    root = str(repository.root)
    if place.is_file() and not _git(root, "ls-files", "--", str(place)):
        return None
    status = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": repository.commit, "changed": None if status is None else bool(status)}


def _git(root: str, *words: str) -> str | None:
    """What git says; None where it cannot be asked."""
    # Not with the program that the folder may name for this: it may have come with a data set
    command = ["git", "-c", "core.fsmonitor=false", "-C", root, *words]
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=_GIT_SECONDS)
    except (OSError, subprocess.SubprocessError):
        LOGGER.debug(f"git {words[0]} is not to be had")
        return None
    return os.fsdecode(done.stdout).strip()


def provenance(trainer: Any) -> dict[str, Any]:
    """What is running, on what, and with what.

    Args:
        trainer: A `DistillationTrainer` that is set up.
    """
    student = unwrap_model(trainer.model)
    record = getattr(student, "student_model", student).record
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "from_epoch": trainer.start_epoch + 1,
        "changed_arguments": plain(trainer.changed_arguments, strict=False),
        "seed": trainer.args.seed,
        "processes": max(trainer.world_size, 1),  # Ultralytics counts none on a CPU
        "device": get_gpu_info(trainer.device.index or 0) if trainer.device.type == "cuda" else "cpu",
        "cpu": get_cpu_info(),
        "threads": torch.get_num_threads(),
        "versions": {
            **{"gid_yolo": __version__, "python": platform.python_version(), "cuda": torch.version.cuda},
            **{name: _version(name) for name in PACKAGES},
        },
        "git": {"gid_yolo": commit_of(Path(__file__).resolve()), "here": commit_of(Path.cwd())},
        "teacher": {
            "path": str(trainer.args.teacher),
            "sha256": digest_of_file(Path(str(trainer.args.teacher))),
            "weights": record.get("teacher_fingerprint"),
        }
        if trainer.distilling
        else None,
        "data": data_of(trainer),
    }


def data_of(trainer: Any) -> dict[str, Any]:
    """The data of a trainer that is set up: their path, and of both splits the number and the digests of images.

    See `split_of`. The path of a converted set changes with its images: it has also what it was converted from.
    """
    names, found = trainer.data["names"], dict[str, Any](path=str(trainer.args.data))
    if source := trainer.data.get(CONVERTED_FROM):
        found[CONVERTED_FROM] = str(source)
    return {**found, "train": trainer.train_split, "val": split_of(trainer.test_loader.dataset.labels, names)}


def split_of(labels: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> dict[str, Any]:
    """The number of images of a split and their digests, see `digest_of_labels`: in their order, and in any."""
    digests = digest_of_labels(labels, names), digest_of_labels(labels, names, in_order=False)
    return {"images": len(labels), "digest": digests[0], "contents": digests[1]}


def changed_since(checkpoint: str | Path, data: Mapping[str, Any], args: Any) -> list[str]:
    """The splits of this run's data, `train` and `val`, that are others than a finished run on the same `data=` had.

    None of them where that run had other parts of the data, and where its folder does not say what it had.

    Args:
        checkpoint: The finished run's `best.pt`, in its folder.
        data: Of this run, see `data_of`.
        args: Of this run.
    """
    folder = Path(checkpoint).parent.parent
    try:
        then, began = _starts_of(folder / "run.json")[-1]["data"], load_yaml(folder / "args.yaml")
        if _source(then) != _source(data) or _part(began) != _part(vars(args)):
            return []
        return [split for split in ("train", "val") if then[split]["contents"] != data[split]["contents"]]
    except (OSError, ValueError, TypeError, LookupError, RecursionError, RuntimeError):  # another program's, or damaged
        return []


def _source(data: Mapping[str, Any]) -> Path:
    """What the user gave as `data=`."""
    return Path(data.get(CONVERTED_FROM) or data["path"]).resolve()


def _part(args: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's arguments choose of its data; of classes, one is a list of one, and their order says nothing."""
    chosen = {key: args.get(key) for key in CHOOSING}
    if (classes := chosen["classes"]) is not None:
        chosen["classes"] = sorted(classes) if isinstance(classes, list | tuple) else [classes]
    return chosen


def same_images(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two entries of a split, see `data_of`, are of the same images; of older ones, in the same order."""
    kind = "contents" if "contents" in one and "contents" in other else "digest"
    return bool(one[kind] == other[kind])


def check_goes_on(record: Mapping[str, Any], now: Mapping[str, Any], data: Any) -> None:
    """Refuse training images that are not those that a resumed run began with; say where they are in another order.

    Args:
        record: Of the run; one of an older version has no `train_contents`.
        now: The images, see `split_of`.
        data: Their yaml.
    """
    noted = {"digest": record.get("train_images"), "contents": record.get("train_contents")}
    before = {key: value for key, value in noted.items() if value is not None}
    if "digest" not in before:
        return
    if not same_images(before, now):
        raise UserError(
            f"data={data} has not the training images, boxes or classes that this run began with (digest "
            f"{now['digest']}, then {before['digest']}): put them back, or start a new run."
        )
    if before["digest"] != now["digest"]:
        LOGGER.warning(
            f"data={data} has the training images in another order than when this run began: it goes on, but not to "
            "the very weights that it would have had without the interruption."
        )


def write_provenance(trainer: Any) -> None:
    """Add this start of a run to its `run.json`, and let its `args.yaml` repeat the run, also after a resumption.

    `gid-train cfg=.../args.yaml` trains what was trained: Ultralytics would note the checkpoint that is resumed.
    """
    path, arguments = trainer.save_dir / "run.json", trainer.save_dir / "args.yaml"
    now, starts = provenance(trainer), (read_or_set_aside(path, _starts_of) if trainer.resume else None) or []
    if starts and not same_images(starts[-1]["data"]["val"], now["data"]["val"]):
        LOGGER.warning(
            f"data={trainer.args.data} has other validation images, boxes or classes than before this resumption: "
            "best.pt and results.csv compare figures of both."
        )
    with replaced(path) as part:
        part.write_text(json.dumps({"starts": [*starts, now]}, indent=2) + "\n", encoding="utf-8")
    if trainer.resume and (model := trainer.model_record.get("model")) and arguments.is_file():
        kept = {**YAML.load(arguments), "model": str(model), "resume": False}
        with replaced(arguments) as part:
            YAML.save(part, kept)


def _starts_of(path: Path) -> list[dict[str, Any]]:
    starts = json.loads(path.read_text(encoding="utf-8"))["starts"]
    return [{**start, "data": {**start["data"], "val": dict(start["data"]["val"])}} for start in starts]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
