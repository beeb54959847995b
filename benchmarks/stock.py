"""AP of stock `yolo val` on our ONNX files against `gid-val` on the checkpoint, for every kind of file.

    python benchmarks/stock.py --models retina.pt fcos.pt frcnn.pt yolo.pt --data my.yaml [--imgsz 320]

Prints a Markdown table of Ultralytics' mAP50-95 in percent: the checkpoint's, and each file's difference from it. All
are measured on the same letterboxed squares, within the limits that the checkpoint is evaluated with.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from ultralytics import YOLO
from ultralytics.utils import LOGGER

from gid_yolo import GID
from gid_yolo.engine.config import thresholds

KINDS = {
    "static": {},
    "static, batch 4": {"batch": 4},
    "dynamic": {"dynamic": True},
    "NMS": {"nms": True},
    "NMS, batch 4": {"nms": True, "batch": 4},
    "NMS, dynamic": {"nms": True, "dynamic": True, "batch": 4},
    "fp16": {"quantize": 16},
    "int8": {"quantize": 8},
}


def row(path: Path, data: str, imgsz: int, split: str, folder: Path) -> list[str]:
    copy = folder / path.parts[-3] / "model.pt" if len(path.parts) > 2 else folder / path.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, copy)
    model = GID(copy)
    common = {"data": data, "split": split, "imgsz": imgsz, "rect": False, "batch": 4, "plots": False}
    common |= {"project": str(folder / "runs"), "workers": 0, "verbose": False}
    limits = thresholds(model.model.yaml)
    whole = 100 * model.val(**common, **limits).box.map
    cells = [copy.parent.name, f"{whole:.2f}"]
    for kind in KINDS.values():
        # Exporting changes the model: each file is of a fresh one
        images = {"data": data} if kind.get("quantize") == 8 else {}
        file = GID(copy).export(**{"imgsz": imgsz, "batch": 1, **images, **kind})
        found = 100 * YOLO(file, task="detect").val(**common, **limits).box.map
        cells.append(f"{round(found - whole, 2) + 0.0:+.2f}")  # + 0.0 takes the sign of -0
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--split", default="val")
    options = parser.parse_args()
    LOGGER.setLevel("ERROR")
    print(f"| checkpoint | gid-val | {' | '.join(KINDS)} |\n| --- |" + " ---: |" * (len(KINDS) + 1), flush=True)
    for path in options.models:
        with tempfile.TemporaryDirectory() as folder:
            cells = row(path.resolve(), options.data, options.imgsz, options.split, Path(folder))
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
