"""From which pyramid level a detector predicts, and from which FPN's rule of sizes would crop the same boxes.

    python benchmarks/levels.py --model best.pt --images images/val --imgsz 160

Of Faster R-CNN the levels beside the rule's are those that its second stage crops the boxes from.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import torch
from ultralytics.data.augment import LetterBox

from gid_yolo.distill.levels import levels_by_size
from gid_yolo.engine.checkpoint import load_model
from gid_yolo.engine.views import distillable
from gid_yolo.export.report import align


def main() -> None:
    """Count, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True, help="a folder")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--conf", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    options = parser.parse_args()
    view = distillable(load_model(options.model)[0].eval().float())
    files = sorted(x for x in options.images.iterdir() if x.suffix.lower() in {".jpg", ".jpeg", ".png"})
    found = []
    for file in files:
        image = LetterBox((options.imgsz, options.imgsz))(image=cv2.imread(str(file)))[..., ::-1]
        with torch.no_grad():
            features, raw = view.raw(torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255)
        rules = view.level_rules(features, raw)
        own = rules.of_predictions(torch.arange(raw.logits.shape[1])[None])
        own = own if rules.of_boxes is None else rules.of_boxes(raw.boxes)
        size = levels_by_size(raw.boxes, view.strides, (options.imgsz, options.imgsz))
        found.append(torch.stack([raw.scores.amax(-1), own.float(), size.float()], -1)[0])
    score, own, size = torch.cat(found).unbind(-1)
    rows = []
    for conf in options.conf:
        kept = score > conf
        counts = [torch.bincount(x[kept].long(), minlength=len(view.strides)).tolist() for x in (own, size)]
        same = (own == size)[kept].float().mean().item()
        rows.append([f"{conf:g}", *(" ".join(map(str, count)) for count in counts), f"{same:.0%}"])
    head = ["score over", f"by its own, strides {' '.join(map(str, view.strides))}", "by size", "same"]
    print(f"{options.model}, {len(files)} images of {options.imgsz} px\n\n{align([head, *rows], [False] * 4)}")


if __name__ == "__main__":
    main()
