"""Batch normalisation as a fixed affine map, computed in the convolution before it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

from timm.layers import FrozenBatchNormAct2d
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from timm.models._features import FeatureListNet
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.resnet import BasicBlock, Bottleneck
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

FROZEN = (FrozenBatchNorm2d, FrozenBatchNormAct2d)
# Parts that call a norm right behind the convolution that it is registered behind, and use that one's map nowhere else
IN_ORDER = (
    *(nn.Sequential, FeatureListNet, EfficientNetFeatures),
    *(BasicBlock, Bottleneck, InvertedResidual, DepthwiseSeparableConv),
)


class NormedConv2d(nn.Conv2d):
    """A convolution whose weights have the scale of a frozen norm, and whose bias is its shift.

    It is linear, and so is the norm: s * (W x) + b = (s * W) x + b. Scaling the weights anew in every pass costs less
    than two more passes over the maps, and the gradient of W is the same.
    """

    norm: tuple[Any]  # in a tuple, for it is registered where it was

    def forward(self, x: Tensor) -> Tensor:
        """Convolution and norm."""
        norm = self.norm[0]
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        bias = shift if self.bias is None else shift + self.bias * scale
        return self._conv_forward(x, self.weight * scale[:, None, None, None], bias)


class AppliedNorm(FrozenBatchNorm2d):
    """A frozen norm that the convolution before it has computed."""

    def forward(self, x: Tensor) -> Tensor:
        """Nothing."""
        return x


class AppliedNormAct(FrozenBatchNormAct2d):
    """Likewise, of one with an activation."""

    def forward(self, x: Tensor) -> Tensor:
        """The activation."""
        return self.act(self.drop(x))


def freeze_norms(body: nn.Module) -> nn.Module:
    """Turn batch normalisation into a fixed affine map, in place; names and tensors of the modules stay."""
    body = freeze_batch_norm_2d(body)
    applied: dict[type, type] = {FrozenBatchNorm2d: AppliedNorm, FrozenBatchNormAct2d: AppliedNormAct}
    for parent, conv_name, norm_name in normed_convolutions(body, FROZEN):
        conv, norm = getattr(parent, conv_name), getattr(parent, norm_name)
        returned = conv_name in getattr(parent, "return_layers", ())  # as ghostnet's first: its map without the norm
        if isinstance(parent, IN_ORDER) and type(conv) is nn.Conv2d and not returned:
            conv.__class__, conv.__dict__["norm"] = NormedConv2d, (norm,)
            norm.__class__ = applied[type(norm)]
    return body


def normed_convolutions(body: nn.Module, norms: Any) -> list[tuple[nn.Module, str, str]]:
    """(parent, convolution, norm) for every norm of some classes that directly follows a convolution in its parent.

    timm registers a layer's norm right behind its convolution (`conv1`, `bn1`), in every network whose norms are batch
    norms; a norm that does not match the convolution's channels is left alone.
    """
    pairs = []
    for parent in body.modules():
        for (conv_name, conv), (norm_name, norm) in pairwise(parent.named_children()):
            follows = isinstance(conv, nn.Conv2d) and isinstance(norm, norms)
            if follows and conv.out_channels == cast(Tensor, norm.running_mean).numel():
                pairs.append((parent, conv_name, norm_name))
    return pairs
