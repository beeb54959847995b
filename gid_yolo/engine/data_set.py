"""`data=`: the embedded set, one of Ultralytics', a yaml, or what is made one of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ultralytics.utils import ONLINE, ROOT, SETTINGS

from gid_yolo.cfg import load_yaml
from gid_yolo.data.convert import prepare_data
from gid_yolo.data.synthetic import is_embedded, synthetic_dataset
from gid_yolo.errors import UserError


def resolve_data(data: Any) -> Path:
    """Path of the data yaml: the embedded set without `data=`, converted where it is VOC or COCO JSON."""
    name = Path(str(data))
    if data is None or (is_embedded(data) and not name.is_file()):  # in a cache that was moved or emptied
        return synthetic_dataset()
    if name.suffix in {".yaml", ".yml"} and not name.is_file():
        if (stored := Path(SETTINGS["datasets_dir"]) / name).is_file():
            return stored
        if shipped := sorted((ROOT / "cfg" / "datasets").rglob(name.name)):
            check_at_hand(name, load_yaml(shipped[0]))
            return name  # one of Ultralytics' own, which it finds and downloads
    return prepare_data(data)


def check_at_hand(name: Path, contents: dict[str, Any]) -> None:
    """Refuse a data set of Ultralytics that is neither here nor to be had.

    Args:
        name: What Ultralytics calls its yaml.
        contents: What that yaml says.

    Raises:
        UserError: Its images are missing and there is no network to download them from.
    """
    root, val = Path(contents.get("path") or "."), contents.get("val") or []
    root = root if root.exists() else Path(SETTINGS["datasets_dir"]) / root  # as Ultralytics looks for it
    if not ONLINE and not all((root / part).exists() for part in (val if isinstance(val, list) else [val])):
        raise UserError(
            f"data={name} is not in {root} and cannot be downloaded without a network: put it there, or name its "
            "place in a data yaml of your own."
        )
