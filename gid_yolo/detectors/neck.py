"""The feature pyramid: torchvision's FPN with coarser levels on top."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7


class TopConvolutions(LastLevelP6P7):
    """P6 and P7 by convolutions of stride 2.

    Args:
        in_channels: Channels of the map P6 is made from.
        out_channels: Channels of both.
        from_p5: Make P6 from P5, not from C5.
        relu: A ReLU between P6 and the convolution of P7.
    """

    def __init__(self, in_channels: int, out_channels: int, *, from_p5: bool, relu: bool) -> None:
        super().__init__(in_channels, out_channels)
        self.use_P5 = from_p5  # torchvision guesses it from the channels, which may be equal
        self.relu = relu

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """The pyramid `p` and its `names` with two levels more; `c` are the backbone's maps."""
        p6 = self.p6((p if self.use_P5 else c)[-1])
        p7 = self.p7(F.relu(p6) if self.relu else p6)
        return [*p, p6, p7], [*names, "p6", "p7"]


class FPN(nn.Module):
    """A map for each of the backbone's, and P6 (and P7) above them (Lin et al. 2017).

    Args:
        in_channels: Channels of the backbone's maps, C5 the last.
        out_channels: Channels of every pyramid level.
        p6_from: `p5` or `c5`, the map that convolutions make P6 and P7 from, as in RetinaNet (torchvision's first
            weights use P5, its v2 weights C5); or `pool`, P5 subsampled to P6 alone, as in Faster R-CNN.
        p7_relu: A ReLU between P6 and P7, where convolutions make them; mmdetection's RetinaNet has none.
    """

    def __init__(self, in_channels: list[int], out_channels: int, *, p6_from: str = "p5", p7_relu: bool = True) -> None:
        super().__init__()
        top: ExtraFPNBlock
        if p6_from == "pool":
            top = LastLevelMaxPool()
        elif p6_from in {"p5", "c5"}:
            from_p5 = p6_from == "p5"
            source = out_channels if from_p5 else in_channels[-1]
            top = TopConvolutions(source, out_channels, from_p5=from_p5, relu=p7_relu)
        else:
            raise ValueError(f"p6_from={p6_from} must be p5, c5 or pool.")
        self.fpn = FeaturePyramidNetwork(in_channels, out_channels, extra_blocks=top)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Map the backbone's maps to the pyramid, finest first, each (B, out_channels, H_l, W_l)."""
        return list(self.fpn(OrderedDict((str(i), x) for i, x in enumerate(features))).values())
