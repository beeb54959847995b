"""What a mode is given: an argument that it has no use for is said, and so is a value of another type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ultralytics.cfg import get_cfg

from gid_yolo.engine.config import DEFAULTS, OWN_KEYS, without_none
from gid_yolo.errors import UserError, some

# This package's own arguments that a mode goes by. How a checkpoint is opened concerns every mode
_OWN: dict[str, tuple[str, ...]] = {
    "val": (),
    "predict": (),
    "export": ("winograd", "file"),
    "visualize": ("teacher", "gid_top_k", "gid_iou"),
}
# Ultralytics' that a mode would leave aside, which reads as if it did otherwise
_IDLE: dict[str, tuple[str, ...]] = {
    "export": ("project", "name", "classes", "split", "epochs"),
    "visualize": ("data", "split", "classes", "conf", "iou", "max_det", "epochs"),
}


def check_use(mode: str, given: Mapping[str, Any]) -> None:
    """Refuse what a mode has no use for.

    Args:
        mode: `val`, `predict`, `export` or `visualize`.
        given: What the user asks for, not what a checkpoint was trained with.

    Raises:
        UserError: Which arguments, in the order in which they were given.
    """
    useless = (OWN_KEYS - {"trust"} - set(_OWN[mode])) | set(_IDLE.get(mode, ()))
    found = [f"{key}={value}" for key, value in without_none(given).items() if key in useless and value is not None]
    if found:
        it, does = ("it", "does") if len(found) == 1 else ("them", "do")
        raise UserError(f"{some(found)} {does} nothing in gid-{mode}: leave {it} out.")


def with_defaults(given: Mapping[str, Any]) -> Any:
    """All arguments, as attributes, once Ultralytics has looked at their types.

    Raises:
        UserError: Its reason, in one sentence.
    """
    try:
        return get_cfg(DEFAULTS, dict(given))
    except (TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error
