"""The configuration inside a checkpoint of mmdetection: Python text, read here as data and never run."""

from __future__ import annotations

import ast
from typing import Any


def read_config(text: str) -> dict[str, Any]:
    """The variables of a configuration, as mmcv and mmengine print it: literals, and calls of `dict`.

    Args:
        text: `meta["config"]` of mmdetection 2.x or `meta["cfg"]` of 3.x.

    Returns:
        Those whose values are literals; others, which would have to be computed, are left out.

    Raises:
        ValueError: It is no Python text.
    """
    try:
        statements = ast.parse(text).body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"its configuration cannot be read ({type(error).__name__}).") from error
    values = {}
    for statement in statements:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            try:
                values[statement.targets[0].id] = _literal(statement.value)
            except ValueError:
                continue
    return values


def _literal(node: ast.expr) -> Any:
    """The value of an expression.

    Raises:
        ValueError: It is neither a literal nor a call of `dict` with literals.
    """
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {word.arg: _literal(word.value) for word in node.keywords}
    if isinstance(node, ast.Dict):
        return {_literal(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True) if key}
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(element) for element in node.elts]
    return ast.literal_eval(node)


def normalisation(config: dict[str, Any], model: dict[str, Any]) -> tuple[list[float], list[float], bool]:
    """Mean and std of the channels, in 0 to 255, in the order that the network takes, and whether that is RGB.

    3.x has them in the model's `data_preprocessor`, 2.x in `img_norm_cfg` or in the `Normalize` of a pipeline.

    Raises:
        ValueError: There are none.
    """
    found = model.get("data_preprocessor") or config.get("data_preprocessor") or config.get("img_norm_cfg")
    found = found or _normalize(config)
    if not found or "mean" not in found or "std" not in found:
        raise ValueError("its configuration has no mean and std of the images.")
    rgb = found["bgr_to_rgb"] if "bgr_to_rgb" in found else found.get("to_rgb", True)
    return [float(x) for x in found["mean"]], [float(x) for x in found["std"]], bool(rgb)


def _normalize(value: Any) -> dict[str, Any] | None:
    """The first `Normalize` step of a pipeline, however deep."""
    if isinstance(value, dict):
        if value.get("type") == "Normalize":
            return value
        value = list(value.values())
    if isinstance(value, list):
        return next((found for part in value if (found := _normalize(part))), None)
    return None
