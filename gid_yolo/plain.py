"""Arguments as they come from calculations."""

from __future__ import annotations

from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """The value with NumPy's numbers as Python's, which all checks of kinds know; alike within dicts, lists, tuples."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: plain(x) for key, x in value.items()}
    return type(value)(map(plain, value)) if type(value) in {list, tuple} else value
