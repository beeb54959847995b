"""Data that somebody else's file names: it is used where it is at hand, and fetched by no program of that file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ultralytics.data.utils import check_det_dataset
from ultralytics.utils import ROOT, YAML, clean_url
from ultralytics.utils.checks import check_file

from gid_yolo.engine.unusable import UNUSABLE
from gid_yolo.errors import UserError, printable

MOST_CLASSES = 100_000
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2", ".txz", ".tbz2")


def check_named(data: Any, by: str) -> None:
    """Refuse data that would be downloaded, by whatever program its yaml holds: only who runs it may say so.

    Args:
        data: As the arguments of a checkpoint name it, None for nothing.
        by: What names it, e.g. `model=best.pt`.

    Raises:
        UserError: It is not at hand, and its yaml says how to get it.
    """
    if data is None or Path(str(data)).is_dir():
        return
    name = str(data)
    try:
        if "://" not in name and Path(name).suffix in {".yaml", ".yml"}:
            contents = YAML.load(check_file(name))
            if contents.get("download"):
                for split in {"train", "val", "test"} & {key for key, value in contents.items() if value}:
                    check_det_dataset(name, autodownload=False, split=split)
            return
    except UNUSABLE:
        pass
    raise UserError(f"{by} names data that is not here or would be downloaded ({printable(name)}): give data=.")


def check_program(data: Any, split: str) -> None:
    """Refuse a data yaml that would run its own program to get the images: it may come from anywhere.

    An archive that is to be downloaded is data; and the programs of Ultralytics' own yamls come with Ultralytics.

    Args:
        data: Path or name of the yaml.
        split: The part that is needed.

    Raises:
        UserError: Images are missing, and the yaml holds a program that would be run to get them.
    """
    try:
        file = Path(check_file(str(data))).resolve()
        contents = YAML.load(file)
        program, shipped = contents.get("download"), file.is_relative_to(ROOT / "cfg" / "datasets")
    except UNUSABLE:
        return  # whoever reads it next says what is wrong
    named = contents.get(split) or (split == "val" and contents.get("validation"))
    if not (named and isinstance(program, str)) or shipped or _is_archive(program):
        return
    try:
        check_det_dataset(str(file), autodownload=False, split=split)
    except FileNotFoundError:
        raise UserError(
            f"data={data}: images of its {split} split are missing, and its download: is a program "
            f"({printable(' '.join(program.split())[:60])}), which is not run. Read it and run it yourself, or give "
            "trust=True."
        ) from None
    except UNUSABLE:
        return


def check_class_count(data: Any) -> None:
    """Refuse a data yaml that claims more classes than can be, before a name is made for each of them.

    Raises:
        UserError: It does.
    """
    try:
        count = YAML.load(check_file(str(data))).get("nc")
    except UNUSABLE:
        return  # whoever reads it next says what is wrong
    if isinstance(count, int | float) and count > MOST_CLASSES:
        raise UserError(
            f"data={data} has nc: {count:.15g}, more classes than the {MOST_CLASSES} that are taken: lower it."
        )


def _is_archive(link: str) -> bool:
    """True for what Ultralytics downloads and unpacks, by its own rule."""
    place = clean_url(link).lower()
    return link.lower().startswith("http") and place.endswith(ARCHIVES)
