"""Any timm network as the bottom-up half of a feature pyramid."""

from __future__ import annotations

import difflib
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import timm
import torch
from timm.models import load_state_dict
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from gid_yolo.detectors.frozen_norm import freeze_norms
from gid_yolo.weights.archive import look

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


class Backbone(nn.Module):
    """The bottom-up half of a feature pyramid: a network that gives maps, behind the normalisation its weights expect.

    Args:
        name: What the settings call it.
        body: Maps (B, 3, H, W) normalised images to a list of maps.
        channels: Channels of each map.
        source: Where the weights came from.
        frozen_names: Parts of the body that are not trained.
        mean: Of each RGB channel in [0, 1].
        std: Likewise.
        freeze_bn: Turn batch normalisation into a fixed affine map, as the detectors' field recipes do when batches
            are small.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        body: nn.Module,
        *,
        channels: list[int],
        source: WeightSource,
        frozen_names: list[str],
        mean: Sequence[float],
        std: Sequence[float],
        freeze_bn: bool,
    ) -> None:
        super().__init__()
        self.name, self.channels, self.source, self.frozen_names = name, channels, source, frozen_names
        self.body: Any = freeze_norms(body) if freeze_bn else body
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) RGB images in [0, 1] to one (B, C_l, H / stride_l, W / stride_l) map per stride."""
        return self.body((images - self.mean) / self.std)

    def take(self, other: Backbone, file: str | Path) -> None:
        """Begin with the weights of another backbone of the same kind, as a detector's of any kind is.

        Args:
            other: The backbone.
            file: Where it is from, for the preflight table and for errors.

        Raises:
            ValueError: It is another network, or its weights expect another normalisation.
        """
        if other.name != self.name:
            raise ValueError(
                f"backbone_weights={file} holds a detector on {other.name}, and the model is on {self.name}: give one "
                f"on {self.name}, or set backbone={other.name}."
            )
        theirs, own = (torch.stack((x.mean, x.std)).flatten(1) for x in (other, self))
        if own.shape != theirs.shape or not torch.allclose(
            own, theirs.to(own), rtol=1e-3
        ):  # a checkpoint keeps half precision
            raise ValueError(
                f"backbone_weights={file} holds a backbone that normalises images by mean and std {_listed(theirs)}, "
                f"and the model's by {_listed(own)}: set mean: and std: of the model's yaml to the file's."
            )
        count = _fill(self.body, self.name, other.body.state_dict(), file)
        self.source = WeightSource(f"{Path(file).name} ({count} tensors of its backbone)", loaded=True)


def _listed(rows: Tensor) -> str:
    return " and ".join(str([round(x, 3) for x in row]) for row in rows.tolist())


class TimmBackbone(Backbone):
    """Feature maps C3, C4, C5 of a timm network, with the input normalisation its weights expect.

    Args:
        name: Any timm model that supports `features_only`, e.g. `resnet50` or `mobilenetv2_100`.
        weights: False for random weights, True for timm's own (downloaded once), or a file of timm's keys
            (`.safetensors`, `.pth`, `.pt`).
        strides: Strides of the maps to return, in pixels.
        freeze_bn: Turn batch normalisation into a fixed affine map, as the detectors' field recipes do when batches
            are small.
        frozen_stages: How many of timm's feature stages to freeze, from the input on (of a ResNet, 1 is the stem and 2
            adds layer1).
        mean: Of each RGB channel in [0, 1], where the weights expect another than timm says.
        std: Likewise.
        stride_in_1x1: Of a ResNet with bottlenecks, stride in the first 1x1 convolution of a block instead of the 3x3,
            as in the first (Caffe) ResNets, whose weights expect it.
    """

    def __init__(
        self,
        name: str,
        *,
        weights: bool | str | Path = False,
        strides: tuple[int, ...] = (8, 16, 32),
        freeze_bn: bool = False,
        frozen_stages: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        stride_in_1x1: bool = False,
    ) -> None:
        try:
            probe = timm.create_model(name, features_only=True, pretrained=False)
        except Exception as error:  # timm raises a different type for each way a name can be unusable
            close = difflib.get_close_matches(name, timm.list_models(), n=5) or ["see timm.list_models()"]
            reason = " ".join(str(error).split())
            raise ValueError(
                f"backbone={name} cannot be used ({reason}); timm's closest: {', '.join(close)}."
            ) from error
        indices = _indices_of(name, probe, strides)
        body: Any = timm.create_model(name, features_only=True, pretrained=False, out_indices=indices)
        if stride_in_1x1:
            _move_strides(name, body)
        super().__init__(
            name,
            body,
            channels=body.feature_info.channels(),
            source=_load_weights(body, name, weights, indices),
            frozen_names=_frozen_names(probe, frozen_stages),
            mean=mean or body.pretrained_cfg["mean"],
            std=std or body.pretrained_cfg["std"],
            freeze_bn=freeze_bn,
        )
        self._check_maps(strides)

    @torch.no_grad()
    def _check_maps(self, strides: tuple[int, ...], side: int = 96) -> None:
        """Run a blank image of a size that no network is made for, and see that the maps are what timm says."""
        training = self.training
        try:
            maps = self.eval()(torch.zeros(1, 3, side, side))
        except Exception as error:  # a transformer of fixed input size asserts
            reason = " ".join(str(error).split())
            raise ValueError(f"backbone={self.name} does not take images of any size ({reason}).") from error
        finally:
            self.train(training)
        wanted = [(1, c, side // s, side // s) for c, s in zip(self.channels, strides, strict=True)]
        if (shapes := [tuple(m.shape) for m in maps]) != wanted:
            raise ValueError(f"backbone={self.name} gives maps of shape {shapes}, but the pyramid needs {wanted}.")


def _move_strides(name: str, body: nn.Module) -> None:
    """Move the stride of every bottleneck from its 3x3 convolution to the 1x1 before it, in place."""
    blocks = [m for m in body.modules() if isinstance(m, Bottleneck)]
    if not blocks:
        raise ValueError(f"stride_in_1x1 is for ResNets with bottlenecks, and backbone={name} has none.")
    for block in blocks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


def _indices_of(name: str, body: Any, strides: tuple[int, ...]) -> tuple[int, ...]:
    """Positions of the feature maps that have the wanted strides (the last map of each, the deepest one)."""
    reduction = body.feature_info.reduction()
    if missing := [s for s in strides if s not in reduction]:
        raise ValueError(
            f"backbone={name} gives feature maps of stride {reduction}, but the pyramid needs stride {missing}: "
            f"choose a backbone with strides {', '.join(map(str, strides))}."
        )
    return tuple(len(reduction) - 1 - reduction[::-1].index(s) for s in strides)


def _frozen_names(probe: Any, stages: int) -> list[str]:
    """Parts of a timm feature network up to and including the one that gives its `stages`-th map."""
    if stages <= 0:
        return []
    ends = [info["module"] for info in probe.feature_info.get_dicts()]
    if stages > len(ends):
        raise ValueError(f"frozen_stages={stages} is more than the {len(ends)} stages of this backbone.")
    parts = []
    for name, child in probe.named_children():
        holds_ends = any(end.startswith(f"{name}.") for end in ends)  # e.g. MobileNet's `blocks` holds all stages
        parts += [f"{name}.{inner}" for inner, _ in child.named_children()] if holds_ends else [name]
    end = ends[stages - 1]
    end = end if end in parts else end.replace(".", "_")  # timm flattens `stages.0` to `stages_0` in some networks
    if end not in parts:
        raise ValueError(f"frozen_stages={stages} cannot be used: this backbone's stages are not in sequence.")
    return parts[: parts.index(end) + 1]


def _load_weights(body: Any, name: str, weights: bool | str | Path, indices: tuple[int, ...]) -> WeightSource:
    if weights is False or weights is None:
        return WeightSource("random (no weights asked for)", loaded=False)
    if weights is True:
        return _download(body, name, indices)
    path = Path(weights)
    if not path.is_file():
        raise ValueError(f"backbone_weights={weights} does not exist: give a file of timm's keys, True or False.")
    try:
        if path.suffix != ".safetensors":
            look(path, ("argparse.Namespace",))  # of timm's own training
        state = load_state_dict(str(path), weights_only=True)  # timm's reader of .safetensors and torch files
        state = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    except Exception as error:  # each kind of damaged file raises its own
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"backbone_weights={weights} cannot be read ({type(error).__name__}: {reason}).") from error
    return WeightSource(f"{path.name} ({_fill(body, name, state, weights)} tensors)", loaded=True)


def _fill(body: Any, name: str, state: Mapping[str, Tensor], weights: str | Path) -> int:
    """Load all that a body has of a state; how many tensors these are. Classifiers have no place here.

    Raises:
        ValueError: Tensors are missing, or have another shape.
    """
    # timm flattens `stages.0` to `stages_0` in some feature networks
    flat = {key.replace(".", "_"): value for key, value in state.items()}
    own = body.state_dict()
    found = {key: flat[key.replace(".", "_")] for key in own if key.replace(".", "_") in flat}
    missing = [key for key in own if key not in found and not key.endswith("num_batches_tracked")]
    misfits = [key for key, value in found.items() if value.shape != own[key].shape]
    if missing or misfits:
        raise ValueError(
            f"backbone_weights={weights} does not fit {name}: of its {len(own)} tensors {len(missing)} are missing and "
            f"{len(misfits)} have another shape (first: {[*missing, *misfits][0]}); give that timm model's own."
        )
    body.load_state_dict(found, strict=False)
    return len(found)


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
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=timeout):
            return True
    except OSError:
        return False
