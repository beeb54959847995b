"""Arguments of a distillation that a run has no use for: they are said, not silently dropped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ultralytics.utils import LOGGER

from gid_yolo.distill.methods import METHODS, parse_methods

_DISTILLING = ("distill", "gid_", "teacher_", "fitnet_", "fine_grained_", "mimicking_")
_CROPS = ("gid_feature", "gid_relation")
# Of GID, by the weights of which one has to be on
_TERMS = {
    **dict.fromkeys(("gid_roi_size", "gid_standardize"), _CROPS),
    "gid_adapt_kernel": (*_CROPS, "gid_cross"),
    "gid_normalize": ("gid_feature",),
    "gid_reduction": ("gid_relation",),
    **dict.fromkeys(("gid_alpha", "gid_beta"), ("gid_response", "gid_cross")),
}
_SELECTION = ("gid_top_k", "gid_iou")  # which the ground truth does not pass


def idle(given: Mapping[str, Any], args: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, str]:
    """What was given and does nothing.

    Args:
        given: By the user.
        args: All arguments of the run.
        defaults: A value that is the default's asks for nothing.

    Returns:
        The reason of each such argument.
    """
    methods = parse_methods(str(args.get("distill") or "none")) if args.get("teacher") else ()
    found = {}
    for key, value in given.items():
        if not key.startswith(_DISTILLING) or value in (None, "none", defaults.get(key)):
            continue
        method = "gid" if key.startswith("gid_") else key.removesuffix("_weight")
        if not methods:
            found[key] = "under distill=none" if args.get("teacher") else "without a teacher"
        elif method in METHODS and method not in methods:
            found[key] = f"without distill={method}"
        elif key in _TERMS and not any(args.get(term) for term in _TERMS[key]):
            found[key] = f"without {' and '.join(_TERMS[key])}"
        elif key in _SELECTION and args.get("gid_types") == "gt":
            found[key] = "under gid_types=gt"
    return found


def tell_idle(given: Mapping[str, Any], args: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Warn of what was given and does nothing, see `idle`."""
    if found := idle(given, args, defaults):
        words = ", ".join(f"{key}={given[key]} ({why})" for key, why in found.items())
        LOGGER.warning(f"{words}: {'this does' if len(found) == 1 else 'these do'} nothing.")
