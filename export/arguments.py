"""The arguments of the benchmark: checked before any work, so that a mistake costs nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gid_yolo.errors import UserError
from gid_yolo.export.providers import check_provider, check_threads

PRECISIONS = ["fp32", "fp16", "int8"]


def refuse(unknown: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse arguments that do not exist, with a guess at what was meant.

    Raises:
        UserError: There is one.
    """
    for key in unknown:
        close = difflib.get_close_matches(key, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(known)}."
        raise UserError(f"'{key}' is not an argument of the benchmark: {hint}")


def several(value: Any) -> list[Any]:
    """One or several values as a list."""
    return list(value) if isinstance(value, list | tuple) else [value]


def words(value: Any) -> list[str]:
    """`a,b`, `[a,b]` or a list as a list of words, each once."""
    if value is None:
        return []
    parts = value.strip().strip("[]").split(",") if isinstance(value, str) else several(value)
    return list(dict.fromkeys(stripped for part in parts if (stripped := str(part).strip().strip("'\""))))


def precisions(value: Any) -> list[str]:
    """The precisions to measure, `fp32` first.

    Raises:
        UserError: Others than `fp32`, `fp16` and `int8`, or not the first.
    """
    found = list(dict.fromkeys(word.lower() for word in words(value)))
    if not found or set(found) - set(PRECISIONS) or "fp32" not in found:
        raise UserError(
            f"precision={value} must be fp32 with or without fp16 and int8, which are measured against it, e.g. "
            "precision=fp32,int8."
        )
    return sorted(found, key=PRECISIONS.index)


def providers(value: Any, device: Any) -> list[str]:
    """The providers to measure on, of `provider=` or of `device=`; the CPU where neither is given.

    Raises:
        UserError: Both are given; one is unknown or not here; or two have one name in the table.
    """
    if device is not None and value is not None:
        raise UserError(f"device={device} and provider={value} say the same: give provider= alone.")
    if device is not None and (name := str(device).strip().lower()) not in {"", "cpu"}:
        match = re.fullmatch(r"(?:cuda:?)?(\d*)", name)
        if match is None:
            raise UserError(
                f"device={device} is not supported by the benchmark: give device=cpu, device=cuda, or provider=."
            )
        value = f"cuda:{match.group(1) or 0}"
    found = [word.lower() for word in words(value)] or ["cpu"]
    names = [check_provider(provider) for provider in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"provider={value} has {twice[0]} more than once: measure each device in a run of its own.")
    return found


def others(value: Any) -> list[Path]:
    """The files of `others=`.

    Raises:
        UserError: None is named.
    """
    if value is None:
        return []
    found = [Path(word) for word in words(value)]
    if not found:
        raise UserError(f"others={value} names no file: give .pt or .onnx files, e.g. others=a.onnx,b.pt.")
    return found


def check_counts(counts: Iterable[tuple[str, Any]], warmup: Any) -> None:
    """Refuse what is not a whole number of at least 1; of `warmup`, 0; and more threads than there are cores.

    Raises:
        UserError: There is one.
    """
    counts = list(counts)
    for key, value in [*counts, ("warmup", warmup)]:
        least = 0 if key == "warmup" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{key}={value} must be a whole number of at least {least}.")
    check_threads(dict(counts).get("threads", 1))


def check_switches(switches: Mapping[str, Any]) -> None:
    """Refuse what is not True or False.

    Raises:
        UserError: There is one.
    """
    for key, value in switches.items():
        if not isinstance(value, bool):
            raise UserError(f"{key}={value} must be True or False.")


def check_drop(value: Any) -> None:
    """Refuse a limit that is no number of points.

    Raises:
        UserError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise UserError(f"max_ap_drop={value} must be a number of at least 0, in points of mAP.")
