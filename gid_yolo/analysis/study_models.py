"""The models that a study trains, by what names them: their kind, their defaults, and what tells them from others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gid_yolo.detectors.build import model_config
from gid_yolo.engine.checkpoint import fingerprint, is_checkpoint, load_model
from gid_yolo.engine.config import model_defaults, yolo_defaults
from gid_yolo.engine.views import distillable
from gid_yolo.engine.yolo_config import yolo_config


def defaults_of(model: str, trust: bool = False) -> dict[str, Any]:
    """What `gid-train` takes for the arguments of a model that are not given."""
    if is_checkpoint(model):
        network = load_model(model, trust=trust)[0]
        return yolo_defaults() if "head" in network.yaml else model_defaults(network.yaml)
    return yolo_defaults() if yolo_settings(model) is not None else model_defaults(model_config(model))


def family_of(model: str, trust: bool = False) -> str:
    """Kind of a model: retinanet, fcos, faster_rcnn or yolo."""
    if is_checkpoint(model):
        return distillable(load_model(model, trust=trust)[0]).family
    return "yolo" if yolo_settings(model) is not None else str(model_config(model)["detector"])


def identity_of(model: str, trust: bool) -> str:
    """What tells a model from others of its name: its settings or its weights."""
    if is_checkpoint(model):
        return fingerprint(load_model(model, trust=trust)[0])
    return json.dumps({k: v for k, v in settings_of(model).items() if k != "yaml_file"}, sort_keys=True, default=str)


def settings_of(model: str) -> dict[str, Any]:
    """What a model's yaml says, ours or Ultralytics'."""
    return model_config(model) if (yolo := yolo_settings(model)) is None else yolo


def yolo_settings(model: str) -> dict[str, Any] | None:
    """What Ultralytics' yaml of a model says, with or without its ending as `GID` takes it; None for ours."""
    file = f"{model}.yaml" if Path(model).suffix == "" else model
    return yolo_config(file) if Path(file).suffix in {".yaml", ".yml"} else None


def label_of(model: str) -> str:
    """A short name: of a `best.pt`, its run's."""
    path = Path(model)
    return path.parents[1].name if path.parent.name == "weights" else path.stem
