"""Where arguments meet: Ultralytics' defaults, ours over them, the model's over ours, the user's over all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ultralytics.cfg import check_dict_alignment, get_cfg
from ultralytics.utils import DEFAULT_CFG_DICT

from gid_yolo.cfg import CFG_DIR, load_yaml
from gid_yolo.detectors.build import built_in_limits, model_config
from gid_yolo.distill.methods import parse_methods
from gid_yolo.engine.values import check_texts, check_values
from gid_yolo.errors import UserError, some

_FILE = load_yaml(CFG_DIR / "default.yaml")
OWN_KEYS = frozenset(_FILE) - frozenset(DEFAULT_CFG_DICT)
DEFAULTS: dict[str, Any] = {**DEFAULT_CFG_DICT, **_FILE}
# What an argument was, in effect, before it existed: in a run that was begun without it
BEFORE: dict[str, Any] = {
    "gid_cross": 0.0,
    "gid_standardize": "raw",
    "gid_weighting": "uniform",
    "gid_level": "size",
    "distill_until": 1.0,
    "distill_decay": "constant",
    "distill_warmup": 0.0,
    "distill_clip": "together",
}

_WEIGHTS = {
    "gid": ("gid_feature", "gid_relation", "gid_response", "gid_cross"),
    "fitnet": ("fitnet_weight",),
    "fine_grained": ("fine_grained_weight",),
    "mimicking": ("mimicking_weight",),
}
_PARTS = ("alpha", "beta")  # of the response loss
# Of a run, not of its training: no file says them
_PLACES = frozenset(
    {"save_dir", "project", "name", "exist_ok", "resume", "model", "data", "pretrained", "teacher", "device", "cache"}
    | {"trust", "cfg", "mode", "task", "recipe", "source", "distill_model", "augmentations", "tracker"}
    | {"backbone_weights"}
)
YOLO_VALIDATION_CONF = 0.001  # what Ultralytics' validator takes where none is given


def model_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Defaults for training a model: Ultralytics', then `cfg/default.yaml`, then the `train:` part of its yaml.

    Where its detections are final, `conf`, `iou` and `max_det` are those of its settings.
    """
    train = config.get("train") or {}
    if not isinstance(train, dict):
        raise UserError(f"train: {str(train)[:80]} in a model's settings must hold 'key: value' lines.")
    check_keys(train)
    limits = built_in_limits(config) if "detector" in config else {}
    training = {key: value for key, value in train.items() if key not in _PLACES}
    return {**DEFAULTS, **limits, **training, "trust": False}  # no file says that it is to be trusted


def yolo_defaults() -> dict[str, Any]:
    """Defaults for Ultralytics' own models: Ultralytics', and those of the distillation.

    Their own features' gradient is over the limit of the clip at first, so that it holds the heads back in plain
    training too: apart from it they would take far larger steps than Ultralytics' learning rates are made for.
    """
    return {**DEFAULT_CFG_DICT, **{key: _FILE[key] for key in OWN_KEYS}, "distill_clip": "together"}


def thresholds(config: Mapping[str, Any]) -> dict[str, Any]:
    """Limits that a model of these settings is evaluated with: `conf`, `iou` of the NMS, `max_det`.

    Our detectors' are the field's (`cfg/default.yaml`, or the model's yaml), YOLO's Ultralytics'.
    """
    if "head" in config:  # a yaml of Ultralytics
        return {"conf": YOLO_VALIDATION_CONF, **{key: DEFAULT_CFG_DICT[key] for key in ("iou", "max_det")}}
    defaults = model_defaults(dict(config))
    return {key: defaults[key] for key in ("conf", "iou", "max_det")}


def without_none(args: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `args` in which `distill=none` is a word again: Ultralytics reads it as Python's None."""
    return {key: "none" if key == "distill" and value is None else value for key, value in args.items()}


def check_keys(args: dict[str, Any]) -> None:
    """Refuse unknown arguments with Ultralytics' "did you mean", and names of files that are no text.

    Raises:
        UserError: An argument that neither Ultralytics nor gid-yolo knows, or that cannot name a file.
    """
    from ultralytics.utils import LOGGER

    level = LOGGER.level
    LOGGER.setLevel("ERROR")  # Ultralytics would print its whole manual before the one sentence that matters
    try:
        check_dict_alignment(DEFAULTS, dict(args))
    except (SyntaxError, TypeError) as error:  # TypeError is of a deprecated argument's value
        raise UserError(" ".join(str(error).split()).replace("YOLO argument", "argument")) from error
    finally:
        LOGGER.setLevel(level)
    check_texts(args)


def check_weights(args: Mapping[str, Any]) -> None:
    """Refuse to train under a teacher by a method whose weight is 0: it would silently not happen.

    Single terms of GID may be off, as in table 6. A weight that `args` do not name has its default.

    Args:
        args: Whose values `check_values` has passed.

    Raises:
        UserError: A method of `distill=` without any term that is on, or a response loss of which no part is.
    """
    if not args.get("teacher"):
        return
    methods = parse_methods(str(args.get("distill", DEFAULTS["distill"]) or "none"))
    for method in methods:
        keys = _WEIGHTS[method]
        if any(args.get(key, DEFAULTS[key]) for key in keys):
            continue
        others = "+".join(name for name in methods if name != method)
        instead = f"distill={others} leaves {method} out" if others else "distill=none trains plainly under the teacher"
        raise UserError(
            f"distill={'+'.join(methods)} asks for {method}, but {some(keys)} {'is' if len(keys) == 1 else 'are'} 0: "
            f"give {'it' if len(keys) == 1 else 'one of them'} a weight; {instead}."
        )
    if "gid" in methods:
        check_gid(args)


def check_gid(args: Mapping[str, Any]) -> None:
    """Refuse settings of GID that contradict each other or that would silently do nothing.

    Raises:
        UserError: What to give instead.
    """
    given = {**DEFAULTS, **{key: value for key, value in args.items() if value is not None}}
    if given["gid_weighting"] == "score" and given["gid_types"] == "gt":
        raise UserError(
            "gid_weighting=score weighs instances by how much two models differ there, but gid_types=gt distils the "
            "ground truth, which has no such score: give gid_weighting=uniform, or other types."
        )
    if given["gid_relation"] and given["gid_types"] != "gt" and given["gid_top_k"] < 3:
        raise UserError(
            f"gid_top_k={given['gid_top_k']} leaves the relation loss nothing to compare: the distance of two "
            "instances, over the mean of theirs, is always 1; give 3 or more, or gid_relation=0."
        )
    cropped = given["gid_feature"] or given["gid_relation"]
    if given["gid_level"] != DEFAULTS["gid_level"] and not cropped:
        raise UserError(
            f"gid_level={given['gid_level']} is about the crops of the feature and relation losses, but gid_feature "
            "and gid_relation are 0: give one a weight, or leave gid_level out."
        )
    if given["distill_clip"] == "apart" and not compares_features(given):
        raise UserError(
            "distill_clip=apart clips by itself what features learn by being compared, but gid_feature, gid_relation "
            "and gid_cross are 0: give one a weight, or leave distill_clip out."
        )
    if given["gid_weighting"] != "uniform" and not given["gid_feature"]:
        raise UserError(
            f"gid_weighting={given['gid_weighting']} weighs the instances of the feature loss, but gid_feature is 0: "
            "give it a weight, or gid_weighting=uniform."
        )
    # The losses of features share one adaptation with it
    if given["gid_cross"] and cropped and given["gid_standardize"] not in {"raw", "crops"}:
        raise UserError(
            f"gid_cross={given['gid_cross']} has the teacher's head read the student's features as they are adapted "
            f"for the feature and relation losses, but gid_standardize={given['gid_standardize']} adapts them to what "
            "that head does not know: give gid_standardize=raw, or gid_feature=0 and gid_relation=0."
        )
    if any(given[f"gid_{x}"] for x in _PARTS):
        return
    for key in ("gid_response", "gid_cross"):
        if weight := given[key]:
            raise UserError(
                f"{key}={weight} is on, but gid_alpha and gid_beta, the weights of its class and its box part, are "
                f"both 0: give one of them a weight, or set {key}=0."
            )


def compares_features(args: Mapping[str, Any]) -> bool:
    """Whether a method of `distill=` has a loss that the features learn by and the heads do not."""
    methods = parse_methods(str(args.get("distill") or "none"))
    return any(method != "gid" for method in methods) or (
        "gid" in methods and any(args.get(key) for key in ("gid_feature", "gid_relation", "gid_cross"))
    )


def checked_args(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a training, after every check that needs no data and no model.

    Raises:
        UserError: One sentence about the first value that cannot work, ours or Ultralytics'.
    """
    try:
        merged = vars(get_cfg(dict(defaults), dict(given)))
        check_values(merged, training=True)
        check_weights(merged)
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, UserError) else UserError(" ".join(str(error).split())) from error
    return merged


def ultralytics_args(args: dict[str, Any]) -> dict[str, Any]:
    """`args` without gid-yolo's own keys, for those of Ultralytics' classes that know only Ultralytics' arguments."""
    return {key: value for key, value in args.items() if key not in OWN_KEYS}


def configured_model(model: str | Path | dict[str, Any], args: Mapping[str, Any]) -> dict[str, Any]:
    """The model's settings with the arguments that replace parts of them put in."""
    config = model_config(model)
    for key in ("backbone", "backbone_weights", "freeze_bn", "frozen_stages"):
        if args.get(key) is not None:
            config[key] = args[key]
    return config
