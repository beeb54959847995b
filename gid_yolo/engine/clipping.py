"""Under a teacher the heads are not slowed by what only features learn."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from gid_yolo.engine.views import heads_of

# Optimisers that divide a step by how large gradients usually are: to them a factor of all matters little
ADAPTIVE = ("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "RMSProp")
MAX_NORM = 10.0  # Ultralytics', which it clips the gradient of all parameters together to


def clips_apart(clip: str | None, optimizer: str) -> bool:
    """Whether `distill_clip=` and the optimiser's name ask for a clip of the features by themselves."""
    return clip == "apart" or (clip == "auto" and optimizer not in ADAPTIVE)


def clip_features(model: nn.Module, student: nn.Module, scaler: torch.amp.GradScaler) -> None:
    """Clip what features are made by, backbone, pyramid and adaptation, by itself, before Ultralytics clips the whole.

    A feature loss of the paper's weight makes most of the gradient's norm, at first hundreds of times the task's.
    Clipped with it the heads, which no comparison of features reaches, learn as many times slower with SGD; AdamW
    forgives it, for it divides by what was usual. What responses teach the heads is clipped with the whole.

    Args:
        model: What is trained: the student and what it learns by.
        student: The student alone.
        scaler: Its scale is still in the gradients.
    """
    heads = {id(parameter) for head in heads_of(student) for parameter in head.parameters()}
    parameters = [p for p in model.parameters() if p.grad is not None and id(p) not in heads]
    if not parameters:
        return
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if scaler.is_enabled():
        norm = norm / scaler.scale(torch.ones_like(norm))  # a tensor: its number would have to be waited for
    clip_grads_with_norm_(parameters, MAX_NORM, norm)
