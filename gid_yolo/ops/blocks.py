"""Boxes a few at a time where a comparison with every prior would fill the memory."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

BLOCK = 2**19  # (image, box, prior) at a time on a CPU: few enough to stay in its cache
BLOCK_OF_DEVICE = 2**23  # likewise elsewhere, where kernels are long enough: some 300 MB of what is made of them


def blocks(boxes: Tensor, valid: Tensor, priors: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """A batch's boxes in blocks, of which all are padded to the image with the most objects.

    Args:
        boxes: (B, M, 4).
        valid: (B, M).
        priors: R that each box will be compared with.

    Yields:
        Index of the first box, (B, m, 4) and (B, m).
    """
    most = BLOCK if boxes.device.type == "cpu" else BLOCK_OF_DEVICE
    size = max(1, most // max(1, boxes.shape[0] * priors))
    for start in range(0, boxes.shape[1], size):
        yield start, boxes[:, start : start + size], valid[:, start : start + size]
