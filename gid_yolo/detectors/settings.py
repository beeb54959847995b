"""What the settings of a detector may be: a yaml comes from anywhere, and a wrong value shows late or never."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

INF = math.inf
BOOLS = (
    *("p7_relu", "whole_anchors", "fit_strides", "level_scales", "sqrt_score", "roi_aligned"),
    *("freeze_bn", "stride_in_1x1"),
)
# Smallest and largest of whole numbers; the largest are far beyond use, and keep a network buildable
WHOLE: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("fpn_channels", "head_width"), (1, 2**14)),
    **dict.fromkeys(("anchor_octaves", "rpn_convs"), (1, 100)),
    **dict.fromkeys(("num_convs", "head_convs", "head_layers", "frozen_stages"), (0, 100)),
    **dict.fromkeys(("rpn_samples", "roi_samples", "max_det"), (1, 10**6)),
    "roi_size": (1, 100),
    "roi_points": (0, 100),
}
# Likewise of numbers
NUMBERS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("positive_iou", "negative_iou", "rpn_positive_iou", "rpn_negative_iou"), (0.0, 1.0)),
    **dict.fromkeys(("roi_positive_iou", "roi_negative_iou", "rpn_nms_iou", "box_nms_iou"), (0.0, 1.0)),
    **dict.fromkeys(("rpn_positive_share", "roi_positive_share", "rpn_min_score", "box_min_score"), (0.0, 1.0)),
    "focal_alpha": (0.0, 1.0),
    "focal_gamma": (0.0, 100.0),
    "prior": (1e-9, 1 - 1e-9),
    "box_beta": (0.0, 1e6),
    "anchor_scale": (1e-3, 1e4),
    "roi_canonical": (1e-3, 1e6),
    "point_offset": (-1.0, 1.0),
    "center_radius": (0.0, INF),
}
# Of each number of a list, and how many of them there are
LISTS: dict[str, tuple[float, float, int | None]] = {
    "aspect_ratios": (1e-3, 1e3, None),
    "level_ranges": (0.0, INF, 2),
    "box_weights": (1e-6, 1e6, 4),
    "mean": (-1e3, 1e3, 3),
    "std": (1e-6, 1e3, 3),
    "strides": (1, 1024, None),
    "rpn_before_nms": (1, 10**6, 2),
    "rpn_after_nms": (1, 10**6, 2),
}
_WHOLE_LISTS = ("strides", "rpn_before_nms", "rpn_after_nms")
_OPTIONAL = ("anchor_sizes", "level_ranges", "mean", "std")  # null is their default
_LONGEST = 100
_PAIRS = (
    ("negative_iou", "positive_iou"),
    ("rpn_negative_iou", "rpn_positive_iou"),
    ("roi_negative_iou", "roi_positive_iou"),
)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse values that no detector can work with; names that there are not are its constructor's matter.

    Args:
        settings: Keyword arguments of a detector and of its backbone.

    Raises:
        ValueError: One sentence about the first of them.
    """
    for name, value in settings.items():
        if value is None and name in _OPTIONAL:
            continue
        if name in BOOLS and not isinstance(value, bool):
            raise ValueError(f"{name}={_short(value)} must be True or False.")
        if name in WHOLE:
            _check_number(name, value, *WHOLE[name], whole=True)
        elif name in NUMBERS:
            _check_number(name, value, *NUMBERS[name])
        elif name in LISTS:
            low, high, count = LISTS[name]
            _check_list(name, value, low, high, count)
        elif name == "anchor_sizes":
            _check_sizes(name, value)
    if 0 < (gamma := settings.get("focal_gamma", 0)) < 1:
        raise ValueError(f"focal_gamma={gamma} must be 0 or at least 1: between them its gradient has no limit.")
    for less, more in _PAIRS:
        if less in settings and more in settings and settings[less] > settings[more]:
            raise ValueError(f"{less}={settings[less]} must not be above {more}={settings[more]}.")


def _check_number(name: str, value: Any, low: float, high: float, whole: bool = False) -> None:
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        what = "a whole number" if whole else "a number"
        limits = f"of at least {low:g}" if high == INF else f"from {low:g} to {high:g}"
        raise ValueError(f"{name}={_short(value)} must be {what} {limits}.")


def _check_list(name: str, value: Any, low: float, high: float, count: int | None) -> None:
    if not isinstance(value, Sequence) or isinstance(value, str) or not 0 < len(value) <= _LONGEST:
        raise ValueError(f"{name}={_short(value)} must be a list of {count or ''} numbers.".replace("  ", " "))
    if count is not None and len(value) != count:
        raise ValueError(f"{name}={_short(value)} must be a list of {count} numbers.")
    for part in value:
        _check_number(f"{name}: {_short(value)}, of which every", part, low, high, whole=name in _WHOLE_LISTS)


def _check_sizes(name: str, value: Any) -> None:
    if not isinstance(value, Sequence) or isinstance(value, str) or not 0 < len(value) <= _LONGEST:
        raise ValueError(f"{name}={_short(value)} must be a list with the sizes of each level.")
    for level in value:
        _check_list(name, level, 1e-3, 1e6, None)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
