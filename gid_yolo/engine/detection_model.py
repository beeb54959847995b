"""A detector in the clothes of an Ultralytics model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import get_num_gradients, get_num_params

from gid_yolo.detectors import Detector, build_detector, model_config
from gid_yolo.detectors.faster_rcnn import FasterRCNN
from gid_yolo.detectors.frozen_norm import FROZEN, NormedConv2d, normed_convolutions
from gid_yolo.errors import UserError
from gid_yolo.ops.boxes import xywh_to_xyxy
from gid_yolo.ops.structures import RawPredictions, Targets

Outputs = tuple[list[Tensor], RawPredictions]


class GIDDetectionModel(DetectionModel):
    """One of our detectors as Ultralytics' trainer, validator, predictor and exporter know a model.

    Args:
        cfg: Model name, yaml file, or settings.
        ch: Input channels; these detectors take RGB only.
        nc: Classes; the yaml's where None.
        verbose: Log a summary.
        load_backbone: Load the backbone weights that the settings ask for; False while a checkpoint follows anyway.

    Attributes:
        model: `nn.Sequential` of the detector alone, so that `model.model[-1]` is the head for Ultralytics' code.
        yaml: The settings, with `nc`; a detector is rebuilt from them.
        record: What produced the weights (data, epochs, teacher, ...), kept in the checkpoint.
        folded: `fuse` has changed the backbone.
    """

    folded = False

    def __init__(
        self,
        cfg: str | Path | dict[str, Any] = "retina_nano",
        ch: int = 3,
        nc: int | None = None,
        verbose: bool = True,
        load_backbone: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # DetectionModel's own would parse a YOLO yaml
        if ch != 3:
            raise UserError(
                f"timm backbones take 3 channels, but the data has channels={ch}: take a YOLO, or RGB images."
            )
        self.yaml = deepcopy(model_config(cfg))
        self.yaml["nc"] = nc or self.yaml.get("nc", 80)
        self.yaml["channels"] = ch
        weights = self.yaml.get("backbone_weights", False) if load_backbone else False
        self.model = nn.Sequential(build_detector(self.yaml, self.yaml["nc"], pretrained=weights or False))
        self.nc = self.yaml["nc"]
        self.names = {i: str(i) for i in range(self.nc)}
        self.stride = torch.tensor([8.0, 16.0, 32.0])  # inputs are multiples of 32; P6 and P7 round up
        self.save: list[int] = []
        self.inplace = False
        self.task = "detect"
        self.criterion = None
        self.record: dict[str, Any] = {}
        if verbose:
            self.info()

    def info(self, detailed: bool = False, verbose: bool = True, imgsz: int | list[int] = 640) -> Any:
        """Ultralytics' summary; of a Faster R-CNN in a line without GFLOPs.

        Those are extrapolated from small images, which the second stage, that works on the proposals there are, does
        not allow: they would be random, and may be negative. `gid-benchmark` counts them.
        """
        if not verbose or not isinstance(self.detector, FasterRCNN):
            return super().info(detailed=detailed, verbose=verbose, imgsz=imgsz)
        layers = sum(not list(module.children()) for module in self.modules())
        parameters, gradients = get_num_params(self), get_num_gradients(self)
        LOGGER.info(f"Model summary: {layers:,} layers, {parameters:,} parameters, {gradients:,} gradients")
        return layers, parameters, gradients, 0.0

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Be pickled as data, see `rebuild`: the file names one function, and holds settings, values and tensors."""
        from gid_yolo.engine.rebuild import store_detector  # which needs this class

        return store_detector(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> GIDDetectionModel:
        """A copy of everything, as of any other module."""
        model = type(self).__new__(type(self))
        memo[id(self)] = model
        model.__setstate__(deepcopy(self.__dict__, memo))
        return model

    @property
    def detector(self) -> Detector:
        """The plain PyTorch detector."""
        return cast(Detector, self.model[-1])

    @property
    def frozen_names(self) -> list[str]:
        """Names for Ultralytics' `freeze=`: the parts of the backbone that the settings freeze."""
        return [f"0.backbone.body.{name}" for name in self.detector.backbone.frozen_names]

    def raw(self, images: Tensor) -> Outputs:
        """Pyramid features and raw predictions of (B, 3, H, W) images in [0, 1]."""
        return self.detector.raw(images)

    def with_classes(self, index: Sequence[int], names: Mapping[int, str]) -> GIDDetectionModel:
        """A copy that predicts only the classes in `index`, in that order and under other names."""
        model = deepcopy(self)
        model.detector.keep_classes(index)
        model.names, model.nc, model.yaml["nc"] = dict(names), len(index), len(index)
        return model

    def _predict_once(self, x: Tensor, profile: bool = False, embed: Any = None) -> Any:
        """Raw outputs in training mode; else detections (B, 4 + nc, R), with the raw outputs unless exported."""
        if self.training:
            return self.raw(x)
        if torch.jit.is_tracing():
            return self.detector(x)
        features, raw = self.raw(x)
        return self.detector.detections(features, raw, *x.shape[-2:]), (features, raw)

    def _predict_augment(self, x: Tensor) -> Any:
        LOGGER.warning("augment=True is not available for this model: predicting at one scale.")
        return self._predict_once(x)

    def set_head_attr(self, **kwargs: Any) -> None:
        """Take no note: what Ultralytics sets here lacks the NMS threshold, see `limited`."""

    def loss(self, batch: dict[str, Any], preds: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Task loss of a batch.

        Returns:
            The loss to minimise, scaled by B / nbs so that gradients summed over nbs images are those of their mean
            loss; and the unscaled named parts.
        """
        outputs = self.raw(batch["img"]) if preds is None else raw_outputs(preds)
        parts = self.detector.loss(*outputs, batch_targets(batch), tuple(batch["img"].shape[-2:]))
        total = torch.stack(list(parts.values())).sum() * self.loss_scale(batch)
        return total, {name: value.detach() for name, value in parts.items()}

    def loss_scale(self, batch: dict[str, Any]) -> float:
        """B / nbs: see `loss`."""
        nbs = self.args["nbs"] if isinstance(self.args, dict) else self.args.nbs
        return batch["img"].shape[0] / nbs

    def init_criterion(self) -> None:
        """There is no criterion object: the loss functions of these detectors are pure."""
        return

    def fuse(self, verbose: bool = True, imgsz: int | list[int] = 640) -> GIDDetectionModel:
        """Fold batch normalisation into the convolutions before it, checked on a probe."""
        body = self.detector.backbone.body
        if _foldable(body):
            self.eval()
            weight = next(body.parameters())
            probe = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(weight)
            with torch.no_grad():
                folded = fold_batch_norm(deepcopy(body))
                same = all(
                    torch.allclose(a, b, rtol=1e-2, atol=1e-2) for a, b in zip(body(probe), folded(probe), strict=True)
                )
            if same:
                self.detector.backbone.body, self.folded = folded, True
            else:  # a network that does not call its modules in the order it registers them
                LOGGER.warning(
                    f"batch normalisation of {self.yaml['backbone']} is left unfolded: it would not be exact."
                )
            self.info(verbose=verbose, imgsz=imgsz)
        return self

    def is_fused(self) -> bool:
        """True once no batch normalisation that `fuse` can fold is left."""
        return not _foldable(self.detector.backbone.body)


@contextmanager
def limited(
    model: Any, *, conf: float | None = None, iou: float | None = None, max_det: int | None = None
) -> Iterator[None]:
    """Let a detector whose detections are final go by these limits for a while; None leaves its own.

    Args:
        model: Ours, alone or as the student of a distillation; every other takes its limits outside the network.
        conf: Score over which a box is a detection.
        iou: Threshold of the NMS within a class.
        max_det: Detections of an image.
    """
    model = getattr(model, "student_model", model)
    detector = model.detector if isinstance(model, GIDDetectionModel) else None
    given = {"conf": conf, "iou": iou, "max_det": max_det}
    values = {name: given[key] for key, name in detector.limits.items() if given[key] is not None} if detector else {}
    before = {name: getattr(detector, name) for name in values}
    try:
        for name, value in values.items():
            setattr(detector, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(detector, name, value)


def raw_outputs(preds: Any) -> Outputs:
    """Features and raw predictions out of what the model returned in training or in evaluation mode."""
    return preds[1] if isinstance(preds[0], Tensor) else preds


def batch_targets(batch: dict[str, Any]) -> Targets:
    """Ground truth of an Ultralytics batch: normalised xywh boxes in one flat list become padded pixels.

    A host that has counted the objects before they went to the device (`count_objects`) does not wait for it.
    """
    height, width = batch["img"].shape[-2:]
    x1, y1, x2, y2 = xywh_to_xyxy(batch["bboxes"].float()).unbind(-1)
    boxes = torch.stack([x1 * width, y1 * height, x2 * width, y2 * height], dim=-1)
    images = batch["img"].shape[0]
    return Targets.from_flat(boxes, batch["cls"].reshape(-1), batch["batch_idx"], images, batch.get("most_objects"))


def count_objects(batch: dict[str, Any]) -> None:
    """Note the largest number of objects in an image of a batch of the loader, which still lies on the host."""
    batch["most_objects"] = int(torch.bincount(batch["batch_idx"].long(), minlength=1).max())


def _foldable(body: nn.Module) -> list[tuple[nn.Module, str, str]]:
    """(parent, convolution, norm) for every batch norm, frozen or not, that directly follows a convolution."""
    return normed_convolutions(body, (nn.BatchNorm2d, *FROZEN))


def fold_batch_norm(body: nn.Module) -> nn.Module:
    """Fold every batch norm that follows a convolution into it, in place (the network must be in eval mode)."""
    for parent, conv_name, norm_name in _foldable(body):
        conv, norm = getattr(parent, conv_name), getattr(parent, norm_name)
        folded = fuse_conv_bn_eval(conv, norm)
        if isinstance(folded, NormedConv2d):
            folded.__class__ = nn.Conv2d  # type: ignore[assignment]
            del folded.__dict__["norm"]
        setattr(parent, conv_name, folded)
        keep = nn.Sequential(norm.drop, norm.act) if hasattr(norm, "act") else nn.Identity()
        setattr(parent, norm_name, keep)
    return body
