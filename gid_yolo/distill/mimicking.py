"""Mimicking (Li et al., Mimicking Very Efficient Network for Object Detection, CVPR 2017), for two-stage detectors."""

from __future__ import annotations

from torch import Tensor

from gid_yolo.ops.losses import mean_over_images
from gid_yolo.ops.precision import wide


def mimicking_loss(teacher: Tensor, student: Tensor, valid: Tensor) -> Tensor:
    """The mimic loss: half the squared distance of the features of proposals, over the number of their elements.

    Args:
        teacher: (B, N, C, h, w) crops at the student's sampled proposals, without a graph.
        student: (B, N, C, h, w) likewise, adapted.
        valid: (B, N) True for a proposal.

    Returns:
        Scalar in at least float32, the mean over images; 0 for an image without a proposal.
    """
    distance = (wide(teacher) - wide(student)).square().flatten(2).mean(-1) / 2  # (B, N)
    return mean_over_images(distance, valid)
