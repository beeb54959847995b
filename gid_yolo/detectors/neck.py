"""The feature pyramid: torchvision's FPN with coarser levels on top."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7


class LastLevelP6P7WithoutReLU(LastLevelP6P7):
    """P6 and P7 without a ReLU between them, as in mmdetection's RetinaNet."""

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Append both to the pyramid `p` of the maps `c`."""
        p6 = self.p6(p[-1] if self.use_P5 else c[-1])
        return [*p, p6, self.p7(p6)], [*names, "p6", "p7"]


class FPN(nn.Module):
    """A map for each of the backbone's, and P6 (and P7) above them (Lin et al. 2017).

    Args:
        in_channels: Channels of the backbone's maps, C5 the last.
        out_channels: Channels of every pyramid level.
        p6_from: `p5` or `c5`, the map that convolutions make P6 and P7 from, as in RetinaNet (torchvision's first
            weights use P5, its v2 weights C5); or `pool`, P5 subsampled to P6 alone, as in Faster R-CNN.
        p7_relu: P7 is made from P6 after a ReLU.
    """

    def __init__(self, in_channels: list[int], out_channels: int, *, p6_from: str = "p5", p7_relu: bool = True) -> None:
        super().__init__()
        top: ExtraFPNBlock
        if p6_from == "pool":
            top = LastLevelMaxPool()
        elif p6_from in {"p5", "c5"}:
            kind = LastLevelP6P7 if p7_relu else LastLevelP6P7WithoutReLU
            top = kind(out_channels if p6_from == "p5" else in_channels[-1], out_channels)
            top.use_P5 = p6_from == "p5"  # torchvision guesses it from the channels, which may be equal
        else:
            raise ValueError(f"p6_from={p6_from} must be p5, c5 or pool.")
        self.fpn = FeaturePyramidNetwork(in_channels, out_channels, extra_blocks=top)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Map the backbone's maps to the pyramid, finest first, each (B, out_channels, H_l, W_l)."""
        return list(self.fpn(OrderedDict((str(i), x) for i, x in enumerate(features))).values())
