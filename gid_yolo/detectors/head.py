"""What the convolutional heads of the detectors have in common."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def tower(channels: int, depth: int, norm: str | None, *, bias: bool | None = None) -> nn.Sequential:
    """`depth` 3x3 convolutions with ReLU, and with GroupNorm between where `norm` is `gn`.

    Args:
        channels: Channels in and out.
        depth: Number of convolutions.
        norm: None or `gn`.
        bias: Biases of the convolutions; None gives them biases only where no norm follows.
    """
    if norm not in {None, "gn"}:
        raise ValueError(f"head_norm={norm} must be null or gn.")
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers.append(nn.Conv2d(channels, channels, 3, padding=1, bias=norm is None if bias is None else bias))
        if norm == "gn":
            layers.append(nn.GroupNorm(math.gcd(32, channels), channels))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def initialise(head: nn.Module, norm: str | None, towers: list[nn.Sequential]) -> None:
    """Weights of std 0.01 and zero biases (focal loss paper, section 4.1); He's where a norm follows."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if norm is None:
        return
    # The norm undoes the weights' scale, so that scale only sets how far a step turns a filter: at the std of 0.01
    # that un-normalised towers need, Adam's steps are as large as the weights
    for layers in towers:
        for module in layers:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


def prior_bias(count: int, prior: float) -> nn.Parameter:
    """(count,) biases that make every class probability `prior` at the start (focal loss paper, section 3.3)."""
    return nn.Parameter(torch.full((count,), -math.log((1 - prior) / prior)))


def per_location(x: Tensor, values: int) -> Tensor:
    """(B, A * values, H, W) to (B, H * W * A, values): R in the order row, column, anchor."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, values)
