"""The feature pyramid: torchvision's FPN with two coarser levels on top."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7


class FPN(nn.Module):
    """P3-P7 from C3-C5 (Lin et al. 2017; P6 and P7 as in RetinaNet).

    Args:
        in_channels: Channels of C3, C4, C5.
        out_channels: Channels of every pyramid level.
        p6_from: `p5` or `c5`, the map P6 is made from (torchvision's v2 weights and most later code use P5).
    """

    def __init__(self, in_channels: list[int], out_channels: int, *, p6_from: str = "p5") -> None:
        super().__init__()
        if p6_from not in {"p5", "c5"}:
            raise ValueError(f"p6_from={p6_from} must be p5 or c5.")
        top = LastLevelP6P7(out_channels if p6_from == "p5" else in_channels[-1], out_channels)
        top.use_P5 = p6_from == "p5"  # torchvision guesses it from the channels, which may be equal
        self.fpn = FeaturePyramidNetwork(in_channels, out_channels, extra_blocks=top)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Map C3-C5 to P3-P7, each (B, out_channels, H_l, W_l)."""
        return list(self.fpn(OrderedDict((str(i), x) for i, x in enumerate(features))).values())
