"""Every kind of detector's response functions, and predictions to try them on."""

from functools import cache

import torch
from torch import Tensor

from gid_yolo.detectors import build_detector
from gid_yolo.distill.response import ResponseFunctions
from gid_yolo.ops.anchors import grid_anchors
from gid_yolo.ops.boxes import decode_deltas
from gid_yolo.ops.dfl import decode_dfl
from gid_yolo.ops.points import decode_ltrb
from gid_yolo.ops.structures import RawPredictions

FAMILIES = ("retinanet", "retinanet_giou", "fcos", "faster_rcnn", "yolo")
CLASSES, BINS = 3, 16
SIZE = (64, 96)
STRIDES = (16, 32)
R = 4 * 6 + 2 * 3
DECODERS = {"fcos": decode_ltrb, "yolo": decode_dfl}


@cache
def functions_of(family: str) -> ResponseFunctions:
    """Mask and losses of a kind of detector."""
    if family == "retinanet":
        return build_detector("retina_nano", CLASSES, box_beta=1 / 9)
    if family == "retinanet_giou":
        return build_detector("retina_nano", CLASSES, box_loss="giou")
    if family == "fcos":
        return build_detector("fcos_nano", CLASSES)
    if family == "faster_rcnn":
        return build_detector("frcnn_nano", CLASSES)
    from ultralytics.nn.tasks import DetectionModel

    from gid_yolo.engine.views import distillable

    return distillable(DetectionModel("yolo11n.yaml", nc=CLASSES, verbose=False)).functions


def make_priors(dtype: torch.dtype = torch.float32) -> Tensor:
    """Two levels of squares as wide as their stride: anchors, and points for the detectors without."""
    cells = torch.tensor([[[0.0, 0, s, s]] for s in STRIDES])
    return grid_anchors(cells, [torch.zeros(1, 1, SIZE[0] // s, SIZE[1] // s) for s in STRIDES], STRIDES).to(dtype)


def make_raw(family: str, batch: int = 2, *, dtype: torch.dtype = torch.float32, graph: bool = False) -> RawPredictions:
    """Random predictions of R boxes; leaves of a graph where asked for."""
    classes = 1 if family == "faster_rcnn" else CLASSES
    logits, centerness = torch.randn(batch, R, classes) * 2, torch.randn(batch, R)
    if family == "yolo":
        regression = torch.randn(batch, R, 4 * BINS)
    elif family == "fcos":
        regression = torch.rand(batch, R, 4) * 2 + 0.3  # sides of the prior: the point lies inside the box
    else:
        regression = torch.randn(batch, R, 4) * 0.5
    leaves = [x.to(dtype).requires_grad_(graph) for x in (logits, regression, centerness)]
    priors = make_priors(torch.float64 if dtype == torch.float64 else torch.float32)
    decoder = DECODERS.get(family, decode_deltas)
    return RawPredictions(leaves[0], leaves[1], priors, decoder, leaves[2] if family == "fcos" else None)


def leaves(raw: RawPredictions) -> list[Tensor]:
    """The tensors that a gradient goes to."""
    return [x for x in (raw.logits, raw.regression, raw.centerness) if x is not None]


def with_leaves(raw: RawPredictions, values: list[Tensor]) -> RawPredictions:
    """The same predictions with other numbers, in the order of `leaves`."""
    centerness = values[2] if len(values) == 3 else None
    return RawPredictions(values[0], values[1], raw.priors, raw.decoder, centerness, raw.sqrt_score)
