"""`device=`: what this machine has."""

from __future__ import annotations

from typing import Any

from ultralytics.utils.torch_utils import parse_device, select_device

from gid_yolo.errors import UserError


def check_device(device: Any) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        UserError: Ultralytics' reason, in one sentence.
    """
    if device is None:
        return
    try:
        select_device(parse_device(device), verbose=False)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise UserError(f"device={device} cannot be used: {reason[:160]}") from error
