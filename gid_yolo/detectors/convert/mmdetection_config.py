"""The configuration that mmdetection keeps in its checkpoints, as text: read as data, nothing in it is run."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STRICT = ("model", "data_preprocessor", "img_norm_cfg", "test_cfg", "train_cfg")  # what is converted is all literals
KEYS = ("cfg", "config")  # of a checkpoint's `meta`: 3.x's and 2.x's
MEND = (
    "save the file with the text of its merged configuration: torch.save({'state_dict': ..., 'meta': "
    "{'cfg': Config.fromfile(the config).pretty_text}}, path)"
)


@dataclass(frozen=True)
class Section:
    """One `dict(...)` of a configuration.

    Attributes:
        name: Where it stands, e.g. `model.neck`.
        values: Its entries; tuples are lists, types are without their modules.
    """

    name: str
    values: dict[str, Any]

    def get(self, *keys: str, default: Any = None) -> Any:
        """The first of `keys` that is there: settings were renamed between versions."""
        return next((self.values[key] for key in keys if key in self.values), default)

    def part(self, key: str, default: dict[str, Any] | None = None) -> Section:
        """A section within this one.

        Raises:
            ValueError: There is none, and no default.
        """
        value = self.values.get(key, default)
        if not isinstance(value, dict):
            raise ValueError(f"its configuration has no {self._path(key)} of mmdetection 2.x or 3.x: {MEND}.")
        return Section(self._path(key), value)

    def expect(self, key: str, *allowed: Any, default: Any = None) -> Any:
        """The value of a setting that has an equal here only at some of its values.

        Raises:
            ValueError: It is another.
        """
        value = self.values.get(key, default)
        if value not in allowed:
            raise ValueError(f"its configuration has {self._path(key)}={value!r}: that cannot be converted.")
        return value

    def _path(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key


def read_config(meta: Mapping[str, Any]) -> Section:
    """The configuration out of the `meta` of a checkpoint.

    Raises:
        ValueError: There is none, or it is not plain data in which base files are merged.
    """
    text = next((meta[key] for key in KEYS if isinstance(meta.get(key), str)), None)
    if text is None:
        raise ValueError(
            "it does not hold mmdetection's configuration, without which its weights can mean several detectors (the "
            f"colours and scale of images, strides, anchors and box coding): {MEND}."
        )
    values: dict[str, Any] = {}
    try:
        for node in ast.parse(text).body:
            if not isinstance(node, ast.Assign) or len(node.targets) != 1 or not isinstance(node.targets[0], ast.Name):
                continue
            name = node.targets[0].id
            if name == "_base_" or name in values:
                raise ValueError(f"{name} is not merged")
            values[name] = _literal(node.value, strict=name in STRICT)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"its configuration cannot be read as plain data ({reason}): {MEND}.") from error
    return Section("", values)


def _literal(node: ast.expr, *, strict: bool) -> Any:
    """The value of a literal, in which `dict(...)` may stand; of anything else None, or an error where `strict`."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return [_literal(item, strict=strict) for item in node.elts]
    if isinstance(node, ast.Dict) and None not in node.keys:
        pairs = zip(node.keys, node.values, strict=True)
        return _typed({_literal(k, strict=True): _literal(v, strict=strict) for k, v in pairs if k is not None})
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        entries: dict[Any, Any] = {}
        for argument in node.args:  # dict({...}), where a key is no identifier
            entries |= _literal(argument, strict=True)
        entries |= {word.arg: _literal(word.value, strict=strict) for word in node.keywords if word.arg}
        if all(word.arg for word in node.keywords):
            return _typed(entries)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand, strict=strict)
        if isinstance(value, int | float):
            return -value
    if strict:
        raise ValueError(f"{ast.unparse(node)[:40]} is no literal")
    return None


def _typed(entries: dict[Any, Any]) -> dict[Any, Any]:
    """The entries with their `type` as a bare name: configurations may give the full path of a class."""
    if isinstance(kind := entries.get("type"), str):
        entries["type"] = kind.rpartition(".")[2]
    return entries
