"""A bound on the memory that the building of a network takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gid_yolo.errors import UserError, printable

MOST_TENSORS = 100_000
ALWAYS = 2**28  # bytes: the rest of a backbone, its classifier, whatever is made to be thrown away
LARGEST = 1_000_000  # setting
LONGEST = 1_000  # list of settings
MOST_LAYERS = 100  # of a kind
MOST_ANCHORS = 10_000  # of all levels
_SIZES = ("anchor_", "aspect_")  # which are finite; a radius need not be
_COUNTS = ("anchor_octaves", "num_convs", "rpn_convs", "head_convs", "head_layers")
_DRAWS = (Tensor.normal_, Tensor.uniform_)
_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)


class Allocations(TorchFunctionMode):
    """Within it, new tensors may take a few times what a checkpoint holds, and no more.

    A network takes twice its own weights while it is built, as timm's are made once to be looked at.

    Args:
        state: The checkpoint's tensors, whose storages are counted.
        filled: The checkpoint's tensors replace all others afterwards: no numbers are drawn for them.
    """

    def __init__(self, state: Any, filled: bool = False) -> None:
        super().__init__()
        self.filled = filled
        values = state.values() if isinstance(state, Mapping) else ()
        storages = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in values if type(v) is Tensor}
        self.left, self.calls = ALWAYS + 12 * sum(storages.values()), 0  # half precision becomes full: 6 times

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count a new tensor before it is made.

        Raises:
            ValueError: It is one too many, or too large.
        """
        kwargs = kwargs or {}
        if func in _FACTORIES:
            self.calls += 1
            self.left -= 4 * math.prod(_sizes(args, kwargs))
            if self.left < 0 or self.calls > MOST_TENSORS:
                raise ValueError("its settings ask for far more memory than its tensors fill")
        if func in _DRAWS and self.filled:
            return args[0]
        return func(*args, **kwargs)


@contextmanager
def built_from(model: nn.Module, what: str) -> Iterator[None]:
    """Build another network from the settings of a checkpoint's, which may be anything.

    Raises:
        UserError: They make none, or one that is far larger than the checkpoint's.
    """
    try:
        _check_yolo(model.yaml)
        with Allocations(model.state_dict()):
            yield
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, ArithmeticError, SyntaxError) as error:
        reason = printable(str(error).rstrip("."), 200)
        raise UserError(f"{what} has settings that make no network ({type(error).__name__}: {reason}).") from error


def _check_yolo(settings: Any) -> None:
    """Refuse rows `[from, repeats, module, arguments]` that would be repeated too often; of others there are none."""
    check_numbers(settings)
    scales = settings.get("scales") or {}
    depths = [settings.get("depth_multiple", 1.0), *(scale[0] for scale in scales.values())]
    for row in [*settings.get("backbone", ()), *settings.get("head", ())] if "head" in settings else ():
        if row[1] * max(1.0, *depths) > MOST_LAYERS:
            raise ValueError(f"a layer is repeated {row[1]} times")


def check_anchors(settings: Mapping[str, Any]) -> None:
    """Refuse settings of a detector that multiply to too many anchors.

    Raises:
        ValueError: How many.
    """
    sizes = settings.get("anchor_sizes") or [[1.0]]
    count = sum(len(level) for level in sizes) * len(settings.get("aspect_ratios") or [1.0])
    count *= settings.get("anchor_octaves") or 1
    if count > MOST_ANCHORS:
        raise ValueError(f"its settings make {count} anchors")


def check_numbers(value: Any, name: Any = "") -> None:
    """Refuse settings with numbers by which a network would take too long to build.

    Raises:
        ValueError: Which of them.
    """
    parts: Any = ()
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = [(name, part) for part in value]
    most = MOST_LAYERS if name in _COUNTS else LARGEST
    bounded = isinstance(value, int) or (isinstance(value, float) and str(name).startswith(_SIZES))
    if bounded and not abs(value) <= most:
        raise ValueError(f"{str(name)[:40]}={str(value)[:40]} is out of bounds")
    if len(parts) > LONGEST:
        raise ValueError(f"{str(name)[:40]} has {len(parts)} values")
    for key, part in parts:
        check_numbers(part, key)


def _sizes(args: Any, kwargs: Any) -> list[int]:
    given = kwargs.get("size", args)
    flat = [n for part in given for n in (part if isinstance(part, list | tuple | torch.Size) else [part])]
    return [n for n in flat if isinstance(n, int) and n > 0]
