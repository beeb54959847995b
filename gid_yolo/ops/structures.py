"""The data that flows from a detector to the losses: raw predictions, targets, general instances."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gid_yolo.ops.precision import wide

BoxDecoder = Callable[[Tensor, Tensor], Tensor]


def probabilities(logits: Tensor) -> Tensor:
    """Of classes, in at least float32: half precision would tie many of them."""
    return wide(logits).sigmoid()


@dataclass(frozen=True)
class RawPredictions:
    """What the heads of a dense detector (or an RPN) put out, before any selection.

    Attributes:
        logits: (B, R, C) class logits; a sigmoid makes them probabilities.
        regression: (B, R, 4) box regression in the detector's own coding; YOLO's are (B, R, 4 * bins).
        priors: (R, 4) xyxy anchors in input pixels, the same for every image of the batch.
        decoder: Maps (regression, priors) to (B, R, 4) xyxy boxes in input pixels.
        centerness: (B, R) logits of FCOS' centre-ness; None for other detectors.
        sqrt_score: Confidences with a centre-ness are the root of the product, not the product.
    """

    logits: Tensor
    regression: Tensor
    priors: Tensor
    decoder: BoxDecoder
    centerness: Tensor | None = None
    sqrt_score: bool = True

    @property
    def scores(self) -> Tensor:
        """(B, R, C) class `probabilities` in [0, 1]."""
        return probabilities(self.logits)

    @property
    def confidences(self) -> Tensor:
        """(B, R, C) what detections are ranked by: the scores, times the centre-ness where there is one."""
        if self.centerness is None:
            return self.scores
        product = self.scores * self.centerness.to(self.scores.dtype).sigmoid()[..., None]
        return product.sqrt() if self.sqrt_score else product

    @property
    def boxes(self) -> Tensor:
        """(B, R, 4) decoded boxes, xyxy in input pixels, not clipped to the image."""
        return self.decoder(self.regression, self.priors)

    def detach(self) -> RawPredictions:
        """The same predictions without a graph."""
        centerness = None if self.centerness is None else self.centerness.detach()
        return replace(self, logits=self.logits.detach(), regression=self.regression.detach(), centerness=centerness)

    def at(self, image: Tensor, output: Tensor) -> RawPredictions:
        """The predictions (image, output), two (N,) of indices into B and R, as those of one image: B = 1, R = N."""
        centerness = None if self.centerness is None else self.centerness[image, output][None]
        return replace(
            self,
            logits=self.logits[image, output][None],
            regression=self.regression[image, output][None],
            priors=self.priors[output],
            centerness=centerness,
        )

    def select_classes(self, index: Tensor | None) -> RawPredictions:
        """The predictions for the classes in `index` (C',), in its order; all of them where `index` is None.

        A single class, which may be an RPN's objectness, is left alone: there is nothing to select.
        """
        if index is None or self.logits.shape[-1] == 1:
            return self
        return replace(self, logits=self.logits.index_select(-1, index))


@dataclass(frozen=True)
class Targets:
    """Ground truth of a batch, padded to the image with the most objects.

    Attributes:
        boxes: (B, M, 4) xyxy in input pixels; zeros where not valid.
        labels: (B, M) class indices; 0 where not valid.
        valid: (B, M) True for a real object. M may be 0.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor

    @classmethod
    def from_flat(
        cls, boxes: Tensor, labels: Tensor, image_index: Tensor, batch_size: int, most: int | None = None
    ) -> Targets:
        """Pad flat lists of objects to a batch.

        Args:
            boxes: (T, 4) xyxy in input pixels.
            labels: (T,) class indices.
            image_index: (T,) index of the image each object lies in, in any order.
            batch_size: Number of images B; images without objects are allowed.
            most: The largest number of objects in an image, M; where it is not given, the host waits for the device.
        """
        order = image_index.argsort(stable=True)
        image = image_index[order].long()
        counts = image.new_zeros(batch_size).index_add(0, image, torch.ones_like(image))  # (B,); `bincount` waits
        if most is None:
            most = int(counts.max()) if batch_size else 0
        slot = torch.arange(len(image), device=image.device) - (counts.cumsum(0) - counts)[image]  # place within image
        padded_boxes = boxes.new_zeros(batch_size, most, 4)
        padded_labels = torch.zeros(batch_size, most, dtype=torch.long, device=boxes.device)
        valid = torch.zeros(batch_size, most, dtype=torch.bool, device=boxes.device)
        padded_boxes[image, slot] = boxes[order]
        padded_labels[image, slot] = labels[order].long()
        valid[image, slot] = torch.ones_like(image, dtype=torch.bool)  # a number would be copied to the device first
        return cls(padded_boxes, padded_labels, valid)

    def gather(self, matched: Tensor) -> tuple[Tensor, Tensor]:
        """Label (B, R) and box (B, R, 4) at the index `matched` (B, R) into M; finite but arbitrary where negative."""
        if self.boxes.shape[1] == 0:  # no object in the whole batch
            return torch.zeros_like(matched), self.boxes.new_zeros(*matched.shape, 4)
        index = matched.clamp(min=0)
        return self.labels.gather(1, index), self.boxes.gather(1, index[..., None].expand(-1, -1, 4))


@dataclass(frozen=True)
class GeneralInstances:
    """The instances GISM selected (section 3.1), sorted by score.

    Attributes:
        boxes: (B, K, 4) GI boxes of equation 2, xyxy in input pixels.
        scores: (B, K) GI scores of equation 1; 0 where not valid.
        indices: (B, K) index of each instance into the R predictions; 0 where not valid.
        valid: (B, K) False where fewer than K instances survived the NMS.
        types: (B, K) index into `distill.types.TYPES`, -1 for none of them and where GISM found nothing; None where
            they were not compared with the ground truth.
    """

    boxes: Tensor
    scores: Tensor
    indices: Tensor
    valid: Tensor
    types: Tensor | None = None
