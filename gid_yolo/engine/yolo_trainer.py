"""Ultralytics' trainer for its own YOLO detectors, with a teacher beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gid_yolo.engine.allocations import built_from
from gid_yolo.engine.config import yolo_defaults
from gid_yolo.engine.distillation import CROPS_OF_LEVELS
from gid_yolo.engine.distillation_trainer import DistillationTrainer
from gid_yolo.engine.freezing import check_parts, parts_of
from gid_yolo.engine.origin import note_origin
from gid_yolo.errors import UserError

# Arguments of our detectors' backbones and schedule, with the values that ask for nothing
_OF_OUR_DETECTORS = {
    "backbone": None,
    "backbone_weights": None,
    "freeze_bn": None,
    "frozen_stages": None,
    "backbone_lr": 1.0,
    "ema_decay": None,
}


class YOLOTrainer(DistillationTrainer):
    """Trains a YOLO detector as Ultralytics does, with its defaults; `teacher=` adds general instance distillation.

    Raises:
        UserError: An argument that only our detectors have.
    """

    @staticmethod
    def check_given(given: Mapping[str, Any]) -> None:
        """Refuse what only our detectors have."""
        for key, nothing in _OF_OUR_DETECTORS.items():
            if given.get(key, nothing) != nothing:
                raise UserError(f"{key}= is for the detectors of gid-yolo: a YOLO model defines that itself.")
        if given.get("teacher") and given.get("gid_standardize") == "crops" and not given.get("resume"):
            raise UserError(CROPS_OF_LEVELS)

    def set_model_attributes(self) -> None:
        """Check `freeze=`, besides what every trainer attaches: Ultralytics would freeze nothing by a text."""
        freeze, layers = self.args.freeze, len(self.model.model)
        if self.resume:  # as it began: a text once froze nothing
            super().set_model_attributes()
            return
        if isinstance(freeze, int) and not isinstance(freeze, bool):  # the first ones
            parts: list[Any] = list(range(freeze))
        else:
            self.args.freeze = (parts := parts_of(freeze)) or None
        if wrong := [x for x in parts if isinstance(x, int) and not 0 <= x < layers]:
            raise UserError(f"freeze={freeze} names layer {wrong[0]}, but the model has 0 to {layers - 1}.")
        check_parts(parts, self.model, freeze, "freeze=10 for the first ten layers, freeze=[0,1], freeze=0.conv")
        super().set_model_attributes()

    terms_in_half = ("box_loss", "cls_loss", "dfl_loss", "l1_loss")  # Ultralytics' own

    @staticmethod
    def defaults_for(model: Any, trust: bool = False) -> dict[str, Any]:
        """Ultralytics' defaults and those of the distillation."""
        return yolo_defaults()

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        """Ultralytics' network.

        Raises:
            UserError: A checkpoint's settings make none, or one that is far larger than its weights.
        """
        if weights is None:
            return super().get_model(cfg, weights, verbose)
        with built_from(weights, f"model={self.args.model}"):
            model = super().get_model(cfg, weights, verbose)
        note_origin(weights, model)
        return model

    @staticmethod
    def family_of(cfg: Any) -> str:
        """Always a YOLO."""
        return "yolo"
