"""Arguments as they come from calculations."""

from __future__ import annotations

from typing import Any

import numpy as np


def as_python(value: Any) -> Any:
    """The value with NumPy's numbers as Python's, which all checks of kinds know; alike within dicts, lists, tuples."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: as_python(x) for key, x in value.items()}
    return type(value)(map(as_python, value)) if type(value) in {list, tuple} else value
