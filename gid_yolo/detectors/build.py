"""From a yaml to a detector: one function that makes keyword arguments, one dict of builders."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gid_yolo.cfg import MODELS_DIR, load_yaml, model_names
from gid_yolo.detectors.backbone import TimmBackbone
from gid_yolo.detectors.detector import Detector
from gid_yolo.detectors.faster_rcnn import FasterRCNN
from gid_yolo.detectors.fcos import FCOS
from gid_yolo.detectors.mobilenet import PREFIX, TorchvisionMobileNet
from gid_yolo.detectors.retinanet import RetinaNet
from gid_yolo.detectors.settings import check_settings
from gid_yolo.errors import UserError

BUILDERS: dict[str, type[Detector]] = {"retinanet": RetinaNet, "fcos": FCOS, "faster_rcnn": FasterRCNN}


BACKBONE_SETTINGS = ("freeze_bn", "frozen_stages", "mean", "std", "stride_in_1x1")
# Settings that place the priors: teacher and student must have them in common
PRIOR_SETTINGS = (
    "anchor_scale",
    "anchor_octaves",
    "anchor_sizes",
    "aspect_ratios",
    "whole_anchors",
    "fit_strides",
    "point_offset",
)


def model_config(model: str | Path | dict[str, Any]) -> dict[str, Any]:
    """The settings of a model: a shipped name (`retina_r50`), a yaml file, or a dict that is already settings.

    Raises:
        UserError: No such name or file, or the file is no model yaml.
    """
    if isinstance(model, dict):
        config = dict(model)
    else:
        path = Path(model)
        if path.suffix not in {".yaml", ".yml"}:
            path = MODELS_DIR / f"{path.name}.yaml"
        elif not path.is_file():
            path = MODELS_DIR / path.name
        if not path.is_file():
            close = difflib.get_close_matches(Path(model).stem, model_names(), n=3, cutoff=0.4)
            advice = f"did you mean {', '.join(close)}?" if close else f"choose from {', '.join(model_names())}."
            raise UserError(f"model={model} is neither a file nor a known model: {advice}")
        try:
            config = load_yaml(path)
        except ValueError as error:
            raise UserError(str(error)) from error
        config["yaml_file"] = path.name
    if missing := [key for key in ("detector", "backbone") if key not in config]:
        raise UserError(
            f"model={str(model)[:200]} lacks '{missing[0]}:' and so is no model definition; see the shipped ones."
        )
    where = "the settings" if isinstance(model, dict) else model
    if not isinstance(config["detector"], str) or config["detector"] not in BUILDERS:
        raise UserError(
            f"detector: {str(config['detector'])[:60]} in {where} is unknown: choose from {', '.join(BUILDERS)}."
        )
    for key in ("settings", "train"):
        if not isinstance(config.get(key) or {}, dict):
            raise UserError(f"{key}: {str(config[key])[:60]} in {where} must be names with their values.")
    return config


def built_in_limits(config: Mapping[str, Any]) -> dict[str, Any]:
    """Ultralytics' `conf`, `iou` and `max_det` as settings say them, of detectors whose detections are final."""
    kind, settings = BUILDERS[config["detector"]], config.get("settings") or {}
    defaults = inspect.signature(kind).parameters
    return {key: settings.get(name, defaults[name].default) for key, name in kind.limits.items()}


def detector_kwargs(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split settings into the keyword arguments of the backbone and those of the detector."""
    backbone = {key: config[key] for key in BACKBONE_SETTINGS if config.get(key) is not None}
    backbone["name"] = config["backbone"]
    return backbone, dict(config.get("settings") or {})


def build_detector(
    model: str | Path | dict[str, Any],
    num_classes: int | None = None,
    pretrained: bool | str | Path = False,
    **overrides: Any,
) -> Detector:
    """Build a detector.

    Args:
        model: A shipped name, a yaml file, or its settings as a dict.
        num_classes: Classes C; None takes `nc` of the yaml.
        pretrained: Weights of the backbone: False is random, True is timm's own, a path is a file of timm's keys.
        **overrides: Replace settings of the yaml, e.g. `backbone="resnet18"` or `fpn_channels=128`.

    Raises:
        UserError: An unknown model, an unknown setting, or a backbone that cannot serve.
    """
    config = model_config(model)
    settings = dict(config.get("settings") or {})
    for key, value in overrides.items():
        (config if key in {"backbone", *BACKBONE_SETTINGS} else settings)[key] = value
    backbone, settings = detector_kwargs({**config, "settings": settings})
    if not isinstance(backbone["name"], str):
        raise UserError(f"backbone={str(backbone['name'])[:60]} must be the name of a timm model.")
    classes = config.get("nc", 80) if num_classes is None else num_classes
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 1:
        raise UserError(f"a detector needs at least one class, but num_classes is {classes!r}.")
    what = config.get("yaml_file", "the model")
    try:
        check_settings({**backbone, **settings})
        kind = BUILDERS[config["detector"]]
        if kind is FasterRCNN and backbone["name"].startswith(PREFIX):
            return kind(TorchvisionMobileNet(weights=pretrained, **backbone), classes, **settings)
        body = TimmBackbone(weights=pretrained, strides=kind.backbone_strides, **backbone)
        detector = kind(body, classes, **settings)
        if tuple(detector.strides[: len(body.channels)]) != kind.backbone_strides:
            given, real = list(detector.strides), [*kind.backbone_strides, 2 * kind.backbone_strides[-1]]
            raise ValueError(f"strides={given} are not those of the backbone's maps and the pooled one, {real}.")
        return detector
    except TypeError as error:  # an unknown keyword: Python's message names it
        raise UserError(f"a setting of {what} does not fit: {error}") from error
    except (RuntimeError, MemoryError) as error:  # there is not so much memory
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"a network of the settings of {what} cannot be made: {reason}") from error
    except ValueError as error:
        raise UserError(str(error)) from error
