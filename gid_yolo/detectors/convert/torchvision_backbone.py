"""torchvision's ResNets with a feature pyramid, as a timm backbone and our neck."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d

from gid_yolo.detectors.convert.converted import renamed

NORM_EPS = 1e-5  # timm's ResNets
DEAD = 1e-30  # variance of a channel that never fires
# Blocks of layer1 to layer4, channels of the first 3x3 convolution's weight, convolutions of a block: timm's name
RESNETS = {
    ((2, 2, 2, 2), (64, 64), 2): "resnet18",
    ((3, 4, 6, 3), (64, 64), 2): "resnet34",
    ((3, 4, 6, 3), (64, 64), 3): "resnet50",
    ((3, 4, 23, 3), (64, 64), 3): "resnet101",
    ((3, 8, 36, 3), (64, 64), 3): "resnet152",
    ((3, 4, 6, 3), (128, 4), 3): "resnext50_32x4d",
    ((3, 4, 23, 3), (256, 8), 3): "resnext101_32x8d",
    ((3, 4, 6, 3), (128, 128), 3): "wide_resnet50_2",
    ((3, 4, 23, 3), (128, 128), 3): "wide_resnet101_2",
}
STAGES = ("conv1", "layer1", "layer2", "layer3", "layer4")


def resnet_config(body: nn.Module, transform: GeneralizedRCNNTransform) -> dict[str, Any]:
    """Settings of the backbone: which ResNet, what of it is frozen, and the normalisation.

    Raises:
        ValueError: The body is no ResNet.
    """
    parts = dict(body.named_children())
    if not {*STAGES} <= set(parts):
        raise ValueError(f"the backbone's parts are {', '.join(parts)[:80]}, not a ResNet's: it cannot be converted.")
    layers: list[Any] = [parts[name] for name in STAGES[1:]]
    block = layers[0][0]
    shape = (
        tuple(len(layer) for layer in layers),
        tuple(block.conv2.weight.shape[:2]),
        3 if hasattr(block, "conv3") else 2,
    )
    if shape not in RESNETS:
        raise ValueError(f"a ResNet with (blocks, channels, convolutions) of {shape} is not known.")
    trained = [any(p.requires_grad for p in parts[name].parameters()) for name in STAGES]
    return {
        "backbone": RESNETS[shape],
        "backbone_weights": False,
        "freeze_bn": isinstance(parts["bn1"], FrozenBatchNorm2d),
        "frozen_stages": next((i for i, stage in enumerate(trained) if stage), len(STAGES)),
        "mean": [float(x) for x in transform.image_mean],
        "std": [float(x) for x in transform.image_std],
    }


def backbone_state(backbone: nn.Module) -> dict[str, Tensor]:
    """Weights of body and pyramid by our names."""
    state = backbone.state_dict()
    for name, module in backbone.named_modules():
        # torchvision sets the epsilon of its first COCO models to 0. Only weight / sqrt(variance + epsilon) counts; the
        # variance stays as it is, for a dead channel's is smaller than a difference of epsilons can hold. Its output is
        # its bias, and half precision could not hold the weight.
        if isinstance(module, FrozenBatchNorm2d) and name.startswith("body.") and module.eps != NORM_EPS:
            variance, weight = state[f"{name}.running_var"], state[f"{name}.weight"]
            alive = variance + module.eps > DEAD
            scale = ((variance + NORM_EPS) / (variance + module.eps).clamp(min=DEAD)).sqrt()
            state[f"{name}.weight"] = (weight * scale).where(alive, 0.0)
        elif isinstance(module, nn.BatchNorm2d) and name.startswith("body.") and module.eps != NORM_EPS:
            variance = state[f"{name}.running_var"]  # which training replaces
            state[f"{name}.running_var"] = (variance + (module.eps - NORM_EPS)).clamp(min=0.0)
    return renamed(state, {"body.": "backbone.body.", "fpn.": "neck.fpn."})


def pyramid_config(backbone: Any) -> dict[str, Any]:
    """Settings of the pyramid that all detectors share."""
    top = backbone.fpn.extra_blocks
    source = ("p5" if top.use_P5 else "c5") if hasattr(top, "use_P5") else "pool"
    return {"fpn_channels": backbone.out_channels, "p6_from": source, "fit_strides": True}
