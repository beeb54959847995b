"""What the processes of a training share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist


def shared_count(count: Tensor) -> Tensor:
    """What a process divides its sum by, so that all together have the sum over the whole batch over its count.

    Gradients are averaged over P processes: each divides by max(sum of the counts, 1) / P. With one process that is
    max(count, 1). In validation, whose batches are not as many in every process, it is too.

    Args:
        count: A scalar, of this process's images.
    """
    if not torch.is_grad_enabled() or not dist.is_available() or not dist.is_initialized():
        return count.clamp(min=1)
    total = count.clone()
    dist.all_reduce(total)
    return total.clamp(min=1) / dist.get_world_size()
