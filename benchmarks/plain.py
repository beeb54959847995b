"""Plain training against torchvision's own detectors, in one run and by turns: images per second of a step.

    python benchmarks/plain.py --imgsz 320 --batch 8 --rounds 5 --json out.json

RetinaNet, FCOS and Faster R-CNN on ResNet-50 as torchvision's factories build them for training from its weights
(frozen batch norms, stem and first stage not trained), and ours with the same weights by `from_torchvision`. Both see
the same images, all of one size, and the same objects, and do a forward pass, the loss, a backward pass and SGD.

- torchvision: takes lists, normalises and resizes them: `min_size` and `max_size` are the images' own, so that nothing
  changes its size. Its tensors are contiguous, as it leaves them.
- torchvision, channels_last: the same model with its weights in channels_last, which it does not do by itself.
- ours: takes the batch; on a CPU in channels_last, as `GIDTrainer` sets it.

The weights are random (a residual branch starts at a fifth, or maps would grow without bound), the images noise. That
both compute the same loss is checked first; Faster R-CNN's, whose samples are drawn at random, with the first of each
kind drawn by both. Each round has each of them once, in random order; a ratio is of a round's two times.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.resnet import Bottleneck
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import get_cpu_info

from gid_yolo.detectors import Detector
from gid_yolo.detectors.convert import from_torchvision
from gid_yolo.ops.structures import Targets

KINDS = {"retinanet": RetinaNet, "fcos": FCOS, "faster_rcnn": FasterRCNN}
NAMES = ("torchvision", "torchvision, channels_last", "ours")
OBJECTS = 8  # of an image
TOLERANCE = 1e-3  # relative, of each loss


def build(kind: str, size: int) -> nn.Module:
    """A detector of torchvision with 91 classes."""
    dense = {} if kind == "faster_rcnn" else {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=3, **dense)
    for module in backbone.modules():
        if isinstance(module, Bottleneck):
            module.bn3.weight.fill_(0.2)
    return KINDS[kind](backbone, 91, min_size=size, max_size=size).train()


class Pair:
    """A model of torchvision and ours, and a batch."""

    def __init__(self, kind: str, *, batch: int, size: int, device: str) -> None:
        torch.manual_seed(0)
        self.device, self.size = device, size
        self.theirs = build(kind, size).to(device)
        self.ours: Detector = from_torchvision(self.theirs).to(device).train()
        for name in self.ours.backbone.frozen_names:
            self.ours.backbone.body.get_submodule(name).requires_grad_(False)
        if device == "cpu":
            self.ours.to(memory_format=torch.channels_last)
        self.images = torch.rand(batch, 3, size, size, device=device)
        corner = torch.rand(batch, OBJECTS, 2) * 0.6 * size
        boxes = torch.cat([corner, corner + (torch.rand(batch, OBJECTS, 2) * 0.35 + 0.05) * size], -1).to(device)
        labels = torch.randint(1, 91, (batch, OBJECTS), device=device)  # of torchvision, 0 is nothing's
        self.objects = [{"boxes": b, "labels": n} for b, n in zip(boxes, labels, strict=True)]
        own = labels - 1 if kind == "faster_rcnn" else labels
        self.targets = Targets(boxes, own, torch.ones_like(own, dtype=torch.bool))
        counts = [sum(p.numel() for p in trained(m)) for m in (self.theirs, self.ours)]
        background = 4 * (1024 + 1) if kind == "faster_rcnn" else 0  # the box that torchvision predicts of no object
        if counts[0] - background != counts[1]:
            raise SystemExit(f"torchvision trains {counts[0]} numbers and ours {counts[1]}.")
        self.optimizers = [torch.optim.SGD(trained(m), lr=1e-6, momentum=0.9) for m in (self.theirs, self.ours)]

    def losses_of_theirs(self) -> dict[str, Tensor]:
        """By torchvision's names."""
        return self.theirs(list(self.images), self.objects)

    def losses_of_ours(self) -> dict[str, Tensor]:
        """By our names."""
        return self.ours.loss(*self.ours.raw(self.images), self.targets, (self.size, self.size))

    def check(self) -> dict[str, float]:
        """The sum of each model's losses.

        Raises:
            SystemExit: They differ.
        """
        with torch.no_grad(), first_of_each_kind():
            found = {
                name: losses()
                for name, losses in (("torchvision", self.losses_of_theirs), ("ours", self.losses_of_ours))
            }
        theirs, ours = (torch.stack(sorted(x.values())) for x in found.values())
        if not torch.allclose(ours, theirs, rtol=TOLERANCE):
            raise SystemExit(f"The losses differ: {found}.")
        return {name: float(sum(losses.values())) for name, losses in found.items()}

    def seconds(self, name: str) -> float:
        """Of a step."""
        ours = name == "ours"
        if not ours:
            layout = torch.channels_last if "channels_last" in name else torch.contiguous_format
            self.theirs.to(memory_format=layout)
        wait = torch.cuda.synchronize if self.device != "cpu" else lambda: None
        losses, optimizer = (self.losses_of_theirs, self.losses_of_ours)[ours], self.optimizers[ours]
        wait()
        began = time.perf_counter()
        torch.stack(list(losses().values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()
        return time.perf_counter() - began


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that are not frozen."""
    return [p for p in model.parameters() if p.requires_grad]


@contextmanager
def first_of_each_kind() -> Iterator[None]:
    """Both samplers take the first of the positives and of the negatives."""

    def falling(like: Tensor) -> Tensor:
        return torch.linspace(0.99, 0.0, like.shape[1], device=like.device).expand(like.shape)

    with (
        mock.patch("torch.randperm", lambda n, device=None: torch.arange(n, device=device)),
        mock.patch("gid_yolo.detectors.faster_rcnn.random_keys", falling),
    ):
        yield


def measure(pair: Pair, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step by name, one value a round."""
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for name in found:  # the first is slower
        pair.seconds(name)
    for number in range(rounds):
        for name in random.Random(number).sample(sorted(found), len(found)):
            found[name].append(pair.seconds(name))
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(KINDS), default=list(KINDS))
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None, help="of PyTorch; all cores where it is not given")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    LOGGER.setLevel("ERROR")
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = get_cpu_info() if options.device == "cpu" else torch.cuda.get_device_name()
    settings = {key: value for key, value in vars(options).items() if key != "json"}
    settings |= {"machine": machine, "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(f"{options.batch} x {options.imgsz} px, {machine}, {settings['threads']} threads")
    contents: dict[str, Any] = {}
    for kind in options.models:
        pair = Pair(kind, batch=options.batch, size=options.imgsz, device=options.device)
        losses = pair.check()
        seconds = measure(pair, options.rounds)
        print(f"{kind}: loss {losses['ours']:.5f}, torchvision's {losses['torchvision']:.5f}")
        for name, times in seconds.items():
            rates = [options.batch / t for t in times]
            print(f"  {name:<34} {min(rates):8.2f} {median(rates):8.2f} {max(rates):8.2f} images/s")
        contents[kind] = {"seconds": seconds, "losses": losses}
        for key, name in (("ours_over_torchvision", NAMES[0]), ("ours_over_torchvision_channels_last", NAMES[1])):
            ratios = [theirs / ours for theirs, ours in zip(seconds[name], seconds["ours"], strict=True)]
            found = {"min": min(ratios), "median": median(ratios), "max": max(ratios)}
            print(f"  ours / {name:<27} {found['min']:8.3f} {found['median']:8.3f} {found['max']:8.3f}", flush=True)
            contents[kind][key] = found
    if options.json:
        options.json.write_text(json.dumps({**contents, "settings": settings}, indent=2) + "\n")


if __name__ == "__main__":
    main()
