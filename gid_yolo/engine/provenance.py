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
from gid_yolo.engine.rebuild import plain
from gid_yolo.engine.side_files import read_or_set_aside
from gid_yolo.files import replaced

PACKAGES = ("torch", "torchvision", "ultralytics", "timm", "numpy", "opencv-python", "pycocotools")
_GIT_SECONDS = 10


def digest_of_labels(labels: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> str:
    """The first 16 digits of the SHA-256 of a split: its images by name, their boxes and classes, in their order.

    The folder that holds all images does not count, so that a copy elsewhere has the same digest; neither do pixels.

    Args:
        labels: Ultralytics' labels: `im_file`, `cls` (M, 1), `bboxes` (M, 4) xywh and, where there are any, `segments`,
            M polygons (K, 2), all as parts of the image.
        names: Of the classes.
    """
    digest = hashlib.sha256(repr(sorted(names.items())).encode())
    files = [Path(label["im_file"]).absolute() for label in labels]  # not resolved: that asks the disk for each
    root = Path(os.path.commonpath([file.parent for file in files])) if files else Path()
    for file, label in zip(files, labels, strict=True):
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
    loaders = {"train": trainer.train_loader, "val": trainer.test_loader}
    splits = {name: loader.dataset.labels for name, loader in loaders.items()}
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
        "data": {
            "path": str(trainer.args.data),
            **{k: {"images": len(v), "digest": digest_of_labels(v, trainer.data["names"])} for k, v in splits.items()},
        },
    }


def changed_since(checkpoint: str | Path, trainer: Any) -> str | None:
    """The split of this run's data that is another one than a finished run on them had, `train` or `val`.

    None where both are the same, where the run was not on these data or on other parts of them, and where its folder
    does not say: what lies there is another program's, or was written by one.

    Args:
        checkpoint: The run's `best.pt`, in its folder.
        trainer: A `DistillationTrainer` that is set up.
    """
    folder = Path(checkpoint).resolve().parent.parent
    now = {"train": trainer.train_loader, "val": trainer.test_loader}
    try:
        then, args = _starts_of(folder / "run.json")[-1]["data"], load_yaml(folder / "args.yaml")
        same = Path(then["path"]).resolve() == Path(trainer.args.data).resolve()
        if not same or any(
            args.get(key) != getattr(trainer.args, key) for key in ("classes", "single_cls", "fraction")
        ):
            return None
        for split, loader in now.items():
            labels, noted = loader.dataset.labels, then[split]
            ordered = split == "val" or args.get("rect") == trainer.args.rect  # images lie by their shapes then
            other = noted["digest"] != digest_of_labels(labels, trainer.data["names"]) if ordered else False
            if other or noted["images"] != len(labels):
                return split
    except (OSError, ValueError, TypeError, LookupError):
        return None
    return None


def write_provenance(trainer: Any) -> None:
    """Add this start of a run to its `run.json`, and let its `args.yaml` repeat the run, also after a resumption.

    `gid-train cfg=.../args.yaml` trains what was trained: Ultralytics would note the checkpoint that is resumed.
    """
    path, arguments = trainer.save_dir / "run.json", trainer.save_dir / "args.yaml"
    now, starts = provenance(trainer), (read_or_set_aside(path, _starts_of) if trainer.resume else None) or []
    if starts and starts[-1]["data"]["val"] != now["data"]["val"]:
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
