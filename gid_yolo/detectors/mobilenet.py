"""torchvision's MobileNets as its own detectors use them, which no timm feature network can stand in for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from gid_yolo.detectors.backbone import Backbone, WeightSource
from gid_yolo.weights.archive import look

PREFIX = "torchvision/"
# The layers of stride 2, at which stages begin, between the first layer and the last, a 1x1 convolution
STAGES = {
    "mobilenet_v2": (0, 2, 4, 7, 14, 18),
    "mobilenet_v3_large": (0, 2, 4, 7, 13, 16),
    "mobilenet_v3_small": (0, 1, 2, 4, 9, 12),
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of torchvision's ImageNet weights


class TappedLayers(nn.Sequential):
    """Layers in sequence that give the outputs of some of them."""

    def __init__(self, layers: Sequence[nn.Module], taps: Sequence[int]) -> None:
        super().__init__(*layers)
        self.taps = tuple(taps)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) to one map for each tap."""
        maps = []
        for i, layer in enumerate(self):
            x = layer(x)
            if i in self.taps:
                maps.append(x)
        return maps


class TorchvisionMobileNet(Backbone):
    """Two maps, both of stride 32: of the last layer of stride 2 and of the 1x1 convolution on top.

    Args:
        name: `torchvision/mobilenet_v3_large`, or another of `STAGES` with this prefix.
        weights: False for random weights, True for torchvision's ImageNet weights (downloaded once), or a file of
            their keys.
        freeze_bn: Turn batch normalisation into a fixed affine map.
        frozen_stages: How many of the six stages to freeze, from the input on.
        mean: Of each RGB channel in [0, 1]; None is ImageNet's.
        std: Likewise.
    """

    def __init__(
        self,
        name: str,
        *,
        weights: bool | str | Path = False,
        freeze_bn: bool = False,
        frozen_stages: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        kind = name.removeprefix(PREFIX)
        if kind not in STAGES:
            raise ValueError(f"backbone={name} cannot be used: choose from {', '.join(PREFIX + n for n in STAGES)}.")
        starts = STAGES[kind]
        if frozen_stages > len(starts):
            raise ValueError(f"frozen_stages={frozen_stages} is more than the {len(starts)} stages of this backbone.")
        # torchvision's detectors keep PyTorch's epsilon, though the classifiers have 1e-3
        layers = getattr(torchvision.models, kind)(weights=None, norm_layer=nn.BatchNorm2d).features
        super().__init__(
            name,
            TappedLayers(layers, starts[-2:]),
            channels=[layers[i].out_channels for i in starts[-2:]],
            source=_load_weights(layers, kind, weights),
            frozen_names=[str(i) for i in range((*starts, len(layers))[frozen_stages])],
            mean=mean or MEAN,
            std=std or STD,
            freeze_bn=freeze_bn,
        )


def _load_weights(layers: nn.Module, kind: str, weights: bool | str | Path) -> WeightSource:
    if weights is False or weights is None:
        return WeightSource("random (no weights asked for)", loaded=False)
    try:
        if weights is True:
            state = torchvision.models.get_model_weights(kind).DEFAULT.get_state_dict(progress=False)
        else:
            look(Path(weights))
            state = torch.load(weights, map_location="cpu", weights_only=True)
        layers.load_state_dict({k[len("features.") :]: v for k, v in state.items() if k.startswith("features.")})
    except Exception as error:  # no network, no file, another network's file: each raises its own
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        if weights is True:
            text = f"RANDOM: the ImageNet weights of {PREFIX}{kind} could not be had ({reason})"
            return WeightSource(text, loaded=False, failed=True)
        raise ValueError(f"backbone_weights={weights} cannot be read ({reason}).") from error
    return WeightSource(f"{PREFIX}{kind} ({'ImageNet' if weights is True else Path(weights).name})", loaded=True)
