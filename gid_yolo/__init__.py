"""General Instance Distillation for small object detectors, on Ultralytics' machinery."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gid_yolo._version import __version__

if TYPE_CHECKING:
    from gid_yolo.model import GID

__all__ = ["GID", "__version__"]


def __getattr__(name: str) -> Any:
    """Import `GID` on first use: `gid_yolo.ops`, `detectors` and `distill` do not need Ultralytics."""
    if name == "GID":
        from gid_yolo.model import GID

        return GID
    raise AttributeError(f"module 'gid_yolo' has no attribute {name!r}")
