"""A trained detector whose backbone another one begins with, of any kind: `backbone_weights=best.pt`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gid_yolo.detectors.backbone import Backbone
from gid_yolo.engine.checkpoint import load_model
from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.engine.safe_load import check_file
from gid_yolo.errors import UserError


def donor_of(weights: Any) -> Backbone | None:
    """The backbone in a checkpoint of ours.

    Args:
        weights: A setting `backbone_weights`.

    Returns:
        None where it is no checkpoint: True, False, or a file of tensors alone, which the backbone reads by itself.

    Raises:
        UserError: A checkpoint of YOLO, which has no timm backbone.
    """
    if not isinstance(weights, str | Path) or Path(weights).suffix.lower() != ".pt" or not Path(weights).is_file():
        return None
    try:
        check_file(Path(weights), "backbone_weights")
    except UserError:
        return None  # tensors alone; what must not be opened is refused by their reader too
    model, _ = load_model(weights, "backbone_weights")
    if not isinstance(model, GIDDetectionModel):
        raise UserError(
            f"backbone_weights={weights} holds a YOLO, which has no timm backbone: give a detector of gid-train's own "
            "kinds, or a file of timm's keys."
        )
    return model.detector.backbone
