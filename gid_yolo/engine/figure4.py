"""Figure 4 of the paper: an image with its general instances, and beside it the heat map of the GI score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from ultralytics.utils.torch_utils import unwrap_model

from gid_yolo.distill.gism import gi_boxes, gi_scores
from gid_yolo.distill.pairing import pair_predictions
from gid_yolo.errors import UserError
from gid_yolo.ops.structures import GeneralInstances, RawPredictions, Targets

if TYPE_CHECKING:
    from gid_yolo.engine.distillation_trainer import DistillationTrainer

Picture = NDArray[np.uint8]

GREEN, RED, YELLOW, CYAN, GREY = (0, 255, 0), (0, 0, 255), (0, 255, 255), (255, 255, 0), (190, 190, 190)  # BGR
COLOURS = {0: RED, 1: YELLOW, 2: CYAN, -1: GREY}  # by index into `distill.types.TYPES`; grey where it is of no type
SMALLEST = 640  # px; smaller images are enlarged, so that lines and numbers can be read


def heat_map(scores: Tensor, shapes: Sequence[tuple[int, int]], size: tuple[int, int]) -> Tensor:
    """The largest GI score of any anchor and level over every pixel.

    Args:
        scores: (R,) GI scores in the order level, row, column, anchor.
        shapes: (height, width) of each pyramid level; every cell has the same number of anchors A.
        size: (height, width) of the map.

    Returns:
        (height, width) in [0, 1].
    """
    cells = [h * w for h, w in shapes]
    anchors = len(scores) // sum(cells)  # A
    levels = [
        F.interpolate(level.reshape(1, 1, h, w, anchors).amax(-1), size=size, mode="bilinear", align_corners=False)
        for level, (h, w) in zip(scores.split([n * anchors for n in cells]), shapes, strict=True)
    ]
    return torch.stack(levels).amax(0)[0, 0]


def painted_boxes(scores: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """The same without common anchors, (height, width): the largest score of the (N, 4) boxes that cover a pixel."""
    rows, columns = (torch.arange(n, device=boxes.device)[None] + 0.5 for n in size)  # (1, H), (1, W)
    heat = boxes.new_zeros(size)
    for score, inside_y, inside_x in zip(
        scores,
        (rows > boxes[:, 1:2]) & (rows < boxes[:, 3:4]),  # (N, H)
        (columns > boxes[:, 0:1]) & (columns < boxes[:, 2:3]),  # (N, W)
        strict=True,
    ):
        heat = torch.maximum(heat, score * (inside_y[:, None] & inside_x[None]))
    return heat


def draw(image: Tensor, truth: Tensor, boxes: Tensor, types: Tensor | None, heat: Tensor) -> Picture:
    """The image with ground truth in green and instances in the colours of their types, and the heat map beside it.

    Args:
        image: (3, H, W) RGB in [0, 1].
        truth: (M, 4) objects, xyxy in pixels.
        boxes: (K, 4) general instances.
        types: (K,) their types, see `distill.types.classify`; None where no ground truth is known: all in grey.
        heat: (H, W) in [0, 1].

    Returns:
        (H', 2 W', 3) BGR.
    """
    picture = image.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).flip(-1).cpu().numpy()
    scale = max(1.0, SMALLEST / max(picture.shape[:2]))
    size = round(picture.shape[1] * scale), round(picture.shape[0] * scale)  # cv2's order: width, height
    left = cv2.resize(picture, size, interpolation=cv2.INTER_LINEAR)
    level = cv2.resize((heat.clamp(0, 1) * 255).byte().cpu().numpy(), size, interpolation=cv2.INTER_LINEAR)
    right = cv2.addWeighted(left, 0.4, cv2.applyColorMap(level, cv2.COLORMAP_JET), 0.6, 0)
    kinds = [-1] * len(boxes) if types is None else types.tolist()
    for box, colour in [(b, GREEN) for b in truth] + [(b, COLOURS[kind]) for b, kind in zip(boxes, kinds, strict=True)]:
        x1, y1, x2, y2 = (box * scale).round().int().tolist()
        cv2.rectangle(left, (x1, y1), (x2, y2), colour, 2)
    return np.concatenate([left, right], axis=1)


def figure(
    index: int,
    images: Tensor,
    predictions: tuple[RawPredictions, RawPredictions],
    instances: GeneralInstances,
    targets: Targets | None,
    shapes: Sequence[tuple[int, int]] | None,
) -> Picture:
    """Figure 4 of one image of a batch.

    Args:
        index: Which of the B images.
        images: (B, 3, H, W) RGB in [0, 1].
        predictions: The teacher's and the student's, of the shared classes.
        instances: What GISM found in them.
        targets: Ground truth; None where it is not known.
        shapes: (height, width) of the levels that both predict on; None where they do not correspond one to one.
    """
    one = slice(index, index + 1)
    size = (images.shape[-2], images.shape[-1])
    teacher, student = predictions
    scores, boxes = (teacher.scores[one], student.scores[one]), (teacher.boxes[one], student.boxes[one])
    if shapes is not None:
        heat = heat_map(gi_scores(*scores)[0], shapes, size)
    else:
        pairs = pair_predictions(*scores, *boxes)
        heat = painted_boxes(gi_scores(*pairs[:2])[0], gi_boxes(*pairs)[0], size)
    valid = instances.valid[index]
    truth = images.new_zeros(0, 4) if targets is None else targets.boxes[index][targets.valid[index]]
    types = None if targets is None or instances.types is None else instances.types[index][valid]
    return draw(images[index], truth, instances.boxes[index][valid], types, heat)


def write_picture(path: Path, picture: Picture) -> Path:
    """Write a PNG.

    Raises:
        UserError: It cannot be written there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), picture):
        raise UserError(f"{path} cannot be written: choose another folder with project= and name=.")
    return path


class Figure4:
    """Draws the first image of every n-th training batch into `gi/<iteration>.png` of the run."""

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every, self.iteration = folder, every, 0

    def start(self, trainer: DistillationTrainer) -> None:
        """Find out which iteration an epoch begins with."""
        self.iteration = trainer.epoch * len(trainer.train_loader)

    def ask(self, trainer: DistillationTrainer) -> None:
        """Before a batch: have the model keep what is drawn, if it is its turn."""
        unwrap_model(trainer.model).sketch = () if self.iteration % self.every == 0 else None

    def end(self, trainer: DistillationTrainer) -> None:
        """After a batch: draw what was kept."""
        model = unwrap_model(trainer.model)
        if model.sketch:
            write_picture(self.folder / f"{self.iteration:06d}.png", figure(0, *model.sketch))
        model.sketch, self.iteration = None, self.iteration + 1
