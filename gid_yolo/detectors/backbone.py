"""Any timm network as the bottom-up half of a feature pyramid."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import timm
import torch
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co")


@dataclass(frozen=True)
class WeightSource:
    """Where a backbone's weights come from, for the preflight table.

    Attributes:
        text: One line for a reader.
        loaded: True where trained weights were loaded, False where the weights are random.
        failed: True where trained weights were asked for but could not be had.
    """

    text: str
    loaded: bool
    failed: bool = False


class TimmBackbone(nn.Module):
    """Feature maps C3, C4, C5 of a timm network, with the input normalisation its weights expect.

    Args:
        name: Any timm model that supports `features_only`, e.g. `resnet50` or `mobilenetv2_100`.
        weights: False for random weights, True for timm's own (downloaded once), or a file of timm's keys
            (`.safetensors`, `.pth`, `.pt`).
        strides: Strides of the maps to return, in pixels.
        freeze_bn: Turn batch normalisation into a fixed affine map, as the detectors' field recipes do when batches
            are small.
        frozen_stages: How many parts to freeze from the input on: 1 is the stem, 2 adds the first stage, ...

    Attributes:
        channels: Channels of each returned map.
        source: Where the weights came from.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        *,
        weights: bool | str | Path = False,
        strides: tuple[int, ...] = (8, 16, 32),
        freeze_bn: bool = False,
        frozen_stages: int = 0,
    ) -> None:
        super().__init__()
        try:
            probe = timm.create_model(name, features_only=True, pretrained=False)
        except Exception as error:  # timm raises a different type for each way a name can be unusable
            close = ", ".join(timm.list_models(f"*{name}*")[:5]) or "timm.list_models() lists them"
            reason = " ".join(str(error).split())
            raise ValueError(f"backbone={name} cannot be used ({reason}); similar timm models: {close}.") from error
        indices = _indices_of(name, probe, strides)
        self.body = timm.create_model(name, features_only=True, pretrained=False, out_indices=indices)
        self.name = name
        self.channels: list[int] = self.body.feature_info.channels()
        self.source = _load_weights(self.body, name, weights, indices)
        cfg = self.body.pretrained_cfg
        self.register_buffer("mean", torch.tensor(cfg["mean"]).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(cfg["std"]).view(1, -1, 1, 1), persistent=False)
        self.frozen_names = _frozen_names(probe, frozen_stages)
        if freeze_bn:
            self.body = freeze_batch_norm_2d(self.body)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) RGB images in [0, 1] to one (B, C_l, H / stride_l, W / stride_l) map per stride."""
        return self.body((images - self.mean) / self.std)


def _indices_of(name: str, body: Any, strides: tuple[int, ...]) -> tuple[int, ...]:
    """Positions of the feature maps that have the wanted strides (the last map of each, the deepest one)."""
    reduction = body.feature_info.reduction()
    if missing := [s for s in strides if s not in reduction]:
        raise ValueError(
            f"backbone={name} gives feature maps of stride {reduction}, but the pyramid needs stride {missing}: "
            "choose a backbone with strides 8, 16 and 32."
        )
    return tuple(len(reduction) - 1 - reduction[::-1].index(s) for s in strides)


def _frozen_names(probe: Any, stages: int) -> list[str]:
    """Parts of a timm feature network up to and including the one that gives its `stages`-th map."""
    if stages <= 0:
        return []
    ends = [info["module"] for info in probe.feature_info.get_dicts()]
    parts = []
    for name, child in probe.named_children():
        holds_ends = any(end.startswith(f"{name}.") for end in ends)  # e.g. MobileNet's `blocks` holds all stages
        parts += [f"{name}.{inner}" for inner, _ in child.named_children()] if holds_ends else [name]
    end = ends[min(stages, len(ends)) - 1]
    end = end if end in parts else end.replace(".", "_")  # timm flattens `stages.0` to `stages_0` in some networks
    return parts[: parts.index(end) + 1]


def _load_weights(body: nn.Module, name: str, weights: bool | str | Path, indices: tuple[int, ...]) -> WeightSource:
    if weights is False or weights is None:
        return WeightSource("random (not asked for)", loaded=False)
    if weights is True:
        return _download(body, name, indices)
    path = Path(weights)
    if not path.is_file():
        raise ValueError(f"backbone_weights={weights} does not exist: give a file of timm's keys, True or False.")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    missing, _ = body.load_state_dict(state, strict=False)  # the classifier of the file has no place here
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing:
        raise ValueError(
            f"backbone_weights={weights} lacks {len(missing)} of the {len(body.state_dict())} tensors of {name} "
            f"(first: {missing[0]}): give weights of that very timm model."
        )
    return WeightSource(f"{path.name} ({len(body.state_dict())} tensors)", loaded=True)


def _download(body: Any, name: str, indices: tuple[int, ...]) -> WeightSource:
    """Load timm's ImageNet weights through its hub cache; random weights, said loudly, where that fails."""
    if not body.pretrained_cfg.get("hf_hub_id") and not body.pretrained_cfg.get("url"):
        return WeightSource(f"RANDOM: timm has no trained weights for {name}", loaded=False, failed=True)
    import huggingface_hub.constants as hub

    # Without this probe the hub client retries for most of a minute before it says that there is no network.
    offline = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = offline or not _reachable(HUB)
    try:
        trained = timm.create_model(name, features_only=True, pretrained=True, out_indices=indices)
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        text = f"RANDOM: the ImageNet weights of {name} could not be had ({type(error).__name__}: {reason})"
        return WeightSource(text, loaded=False, failed=True)
    finally:
        hub.HF_HUB_OFFLINE = offline
    body.load_state_dict(trained.state_dict())
    return WeightSource(f"timm {name} ({trained.pretrained_cfg.get('tag') or 'ImageNet'})", loaded=True)


def _reachable(url: str, timeout: float = 3.0) -> bool:
    """True where a TCP connection to `url`'s host opens within `timeout` seconds, or a proxy stands between."""
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True
    parts = urlsplit(url)
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 443), timeout=timeout):
            return True
    except OSError:
        return False
