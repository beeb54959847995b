"""Values that arguments may have: of all of ours, and of Ultralytics' where it would take what cannot work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gid_yolo.distill.fading import DECAYS
from gid_yolo.distill.gid import WEIGHTINGS
from gid_yolo.distill.levels import LEVELS
from gid_yolo.distill.methods import parse_methods
from gid_yolo.distill.standardize import STANDARDIZE
from gid_yolo.distill.types import parse_types
from gid_yolo.engine.schedule import check_schedule, check_shares
from gid_yolo.errors import UserError

MIN_IMGSZ = 64
MAX_IMGSZ = 2**15  # 3 GiB an image

# Smallest and largest value
_WHOLE: dict[str, tuple[int, float]] = {
    **dict.fromkeys(("gid_roi_size", "gid_adapt_kernel", "gid_top_k", "max_det"), (1, math.inf)),
    **dict.fromkeys(("teacher_sample", "teacher_epochs"), (1, math.inf)),
    **dict.fromkeys(("workers", "close_mosaic"), (0, math.inf)),
    "save_period": (-1, math.inf),
    "seed": (0, 2**32 - 1),  # NumPy's
}
_NUMBERS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        ("gid_feature", "gid_relation", "gid_response", "gid_cross", "gid_alpha", "gid_beta"), (0, math.inf)
    ),
    **dict.fromkeys(("fitnet_weight", "fine_grained_weight", "mimicking_weight"), (0, math.inf)),
    **dict.fromkeys(("backbone_lr", "teacher_min_ap", "warmup_epochs", "box", "cls", "dfl"), (0, math.inf)),
    **dict.fromkeys(("gid_iou", "ema_decay", "conf", "iou", "distill_until", "distill_warmup"), (0, 1)),
}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "gid_normalize": ("instance", "pixel"),
    "gid_standardize": STANDARDIZE,
    "gid_weighting": WEIGHTINGS,
    "gid_level": LEVELS,
    "distill_decay": DECAYS,
    "distill_clip": ("auto", "apart", "together"),
    "gid_reduction": ("mean", "sum"),
    "teacher_precision": ("fp32", "bf16", "fp16"),
    "cache": (True, False, "ram", "disk"),
    "compile": (True, False, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "trust": (True, False),
}
_NAMES = ("project", "name")  # Ultralytics makes a text of a number
_TEXTS = ("cfg", "recipe", "data", "teacher", "save_dir", "backbone", "file")


def check_texts(args: Mapping[str, Any], also: Sequence[str] = ()) -> None:
    """Refuse what should name a file, a folder or a model, and is no text.

    Args:
        args: By name.
        also: Names of further ones, which are texts in some modes.

    Raises:
        UserError: The first of them.
    """
    for key in (*_TEXTS, *also):
        value = args.get(key)
        if value is not None and not isinstance(value, str | Path):
            raise UserError(f"{key}={value} must be a text.")
    for key in _NAMES:
        value = args.get(key)
        if value is not None and not (isinstance(value, str | Path) or _is_number(value)):
            raise UserError(f"{key}={value} must be a text.")
    if ".." in Path(str(args.get("name") or "")).parts:
        raise UserError(f"name={args['name']} leads out of the runs' folder: give project= another one.")
    if not isinstance(value := args.get("pretrained") or False, str | Path | bool):
        raise UserError(f"pretrained={value} must be a file, True or False.")


def check_values(args: Mapping[str, Any], *, training: bool = False) -> None:
    """Check values as far as that needs neither data nor model.

    Args:
        args: By name.
        training: `batch` may also be -1 or a part of 1, for which Ultralytics looks for one that fits the GPU.

    Raises:
        UserError: One sentence about the first value that cannot work.
    """
    check_texts(args)
    for key, value in args.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}={value} must be a finite number.")
    for key, choices in _CHOICES.items():
        value = args.get(key)
        if value is not None and not any(value is x or (value == x and isinstance(x, str)) for x in choices):
            raise UserError(f"{key}={value} is unknown: choose from {', '.join(map(str, choices))}.")
    for key, (low, high) in _WHOLE.items():
        _check_number(args, key, low, high, whole=True)
    for key, limits in _NUMBERS.items():
        _check_number(args, key, *limits)
    for key in ("gid_visualize_every", "gradients"):
        every = args.get(key) or 0
        if isinstance(every, bool) or not isinstance(every, int) or every < 0:
            raise UserError(f"{key}={every} must be a whole number of iterations, or 0 for never.")
    if (args.get("gid_adapt_kernel") or 1) % 2 == 0:
        raise UserError(f"gid_adapt_kernel={args['gid_adapt_kernel']} must be odd, so that crops keep their size.")
    if args.get("distill_until") == 0:
        raise UserError("distill_until=0 would distil nothing: give a share of the run over 0; distill=none is off.")
    until, warmup = args.get("distill_until") or 1.0, args.get("distill_warmup") or 0.0
    if warmup > until:
        raise UserError(
            f"distill_warmup={warmup} is longer than distill_until={until}: the terms would end before they have their "
            "weights; lower the first or raise the second."
        )
    check_schedule(args)
    check_shares(args)
    try:
        parse_types(str(args.get("gid_types") or "all"))
        parse_methods(str(args.get("distill") or "none"))
    except ValueError as error:
        raise UserError(str(error)) from error
    _check_imgsz(args)
    batch = args.get("batch")
    if not (training and isinstance(batch, int | float) and (batch == -1 or 0 < batch < 1)):
        _check_number(args, "batch", 1, math.inf, whole=True)
    if (momentum := args.get("momentum")) is not None and _is_number(momentum) and momentum >= 1:
        raise UserError(f"momentum={momentum} must be under 1: a step would keep all of those before it.")
    if (time := args.get("time")) is not None and not (_is_number(time) and time > 0):
        raise UserError(f"time={time} must be a number of hours over 0.")
    transforms = args.get("augmentations") or []
    if not isinstance(transforms, list | tuple) or not all(callable(x) for x in transforms):
        raise UserError(f"augmentations={transforms} must be a list of Albumentations' transforms, made in Python.")


def _check_number(args: Mapping[str, Any], key: str, low: float, high: float, whole: bool = False) -> None:
    value = args.get(key)
    if value is None or (_is_number(value) and low <= value <= high and not (whole and not isinstance(value, int))):
        return
    what = "a whole number" if whole else "a number"
    limits = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:,.10g}".replace(",", "")
    raise UserError(f"{key}={value} must be {what} {limits}.")


def _check_imgsz(args: Mapping[str, Any]) -> None:
    if (given := args.get("imgsz")) is None:
        return
    sizes = list(given) if isinstance(given, list | tuple) else [given]
    if not sizes or any(isinstance(size, bool) or not isinstance(size, int) for size in sizes):
        raise UserError(
            f"imgsz={given} must be a whole number, or height and width, e.g. imgsz=320 or imgsz=[256,320]."
        )
    if min(sizes) < MIN_IMGSZ:
        raise UserError(f"imgsz={given} is too small for a pyramid of strides 8 to 128: use at least {MIN_IMGSZ}.")
    if max(sizes) > MAX_IMGSZ:
        raise UserError(f"imgsz={given} is too large: use at most {MAX_IMGSZ}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
