"""One split, letterboxed once for all: the same images for comparing, timing and scoring every model."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from ultralytics.cfg import get_cfg
from ultralytics.data import build_dataloader, build_yolo_dataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils import LOGGER

from gid_yolo.engine.checkpoint import no_autoinstall
from gid_yolo.engine.data_set import resolve_data
from gid_yolo.engine.named_data import check_class_count, check_program
from gid_yolo.engine.unusable import UNUSABLE, check_class_names, reading, reason_of
from gid_yolo.engine.validator import GIDValidator
from gid_yolo.engine.values import check_values
from gid_yolo.errors import UserError
from gid_yolo.export.session import OnnxDetector


def read_data(data: Any, split: str, trust: bool = False) -> tuple[Path, dict[str, Any]]:
    """The data yaml's path and contents, with paths resolved; the embedded set for None.

    Raises:
        UserError: No such data set, it has no such split, or would run a program to get it and is not trusted.
    """
    path = resolve_data(data)
    if not trust:
        check_program(path, split)
    check_class_count(path)
    try:
        contents = check_det_dataset(str(path), split=split)
    except UNUSABLE as error:
        raise UserError(f"split={split} of data={path} cannot be used: {reason_of(error)}") from error
    check_class_names(contents["names"], path)
    return Path(path), contents


def image_size(imgsz: Any, stride: int) -> list[int]:
    """Height and width, rounded up to multiples of the networks' largest stride.

    Raises:
        UserError: Not one or two whole numbers of at least the smallest size.
    """
    sizes = list(imgsz) if isinstance(imgsz, list | tuple) else [imgsz]
    if len(sizes) not in (1, 2) or any(isinstance(n, bool) or not isinstance(n, int) for n in sizes):
        raise UserError(
            f"imgsz={imgsz} must be a whole number, or height and width, e.g. imgsz=320 or imgsz=[256,320]."
        )
    check_values({"imgsz": sizes})
    rounded = [-(-n // stride) * stride for n in sizes]
    if rounded != sizes:
        LOGGER.warning(f"imgsz={imgsz} is rounded up to {rounded}: the network takes multiples of {stride}.")
    return rounded * 2 if len(rounded) == 1 else rounded


def image_sizes(imgsz: Any, stride: int) -> list[list[int]]:
    """`image_size` of one size or of a list of pairs.

    Raises:
        UserError: As `image_size`.
    """
    several = isinstance(imgsz, list | tuple) and imgsz and all(isinstance(size, list | tuple) for size in imgsz)
    sizes = [image_size(size, stride) for size in imgsz] if several else [image_size(imgsz, stride)]
    return [size for i, size in enumerate(sizes) if size not in sizes[:i]]


def open_split(data: Path, contents: dict[str, Any], *, split: str, imgsz: Sequence[int], batch: int) -> Any:
    """Ultralytics' validation dataloader with every image letterboxed to `imgsz` (height, width).

    Static ONNX files take one size only. Handed to the validator, the loader makes sure that the checkpoint sees the
    same pixels: left to itself, the validator makes a square of an unequal size for a checkpoint.

    Raises:
        UserError: No images.
    """
    args = get_cfg(overrides=_arguments(data, split, batch) | {"imgsz": list(imgsz)})
    with reading(data, split):
        dataset = build_yolo_dataset(args, contents[split], batch, contents, mode="val", rect=False)
    return build_dataloader(dataset, batch, workers=0, shuffle=False, device="cpu")


def spread(length: int, count: int) -> list[int]:
    """At most `count` places spread evenly over so many."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()


def batches_of(dataset: Any, count: int, batch: int) -> list[np.ndarray]:
    """`count` images spread evenly over the split, as (batch, 3, H, W) arrays in [0, 1]; the last is filled up."""
    chosen = spread(len(dataset), count)
    images = [dataset[i]["img"].numpy().astype(np.float32) / 255 for i in chosen]
    images += [images[i % len(images)] for i in range(-len(images) % batch)]
    return [np.stack(images[i : i + batch]) for i in range(0, len(images), batch)]


def ten_columns(
    network: nn.Module | OnnxDetector,
    *,
    data: Path,
    split: str,
    loader: Any,
    device: Any,
    save_dir: Path,
    limits: dict[str, Any],
) -> dict[str, float]:
    """The paper's ten columns of a checkpoint's network or of an ONNX file, in percent.

    Args:
        network: It; a file runs on the provider that it was opened on.
        data: The data yaml.
        split: Part of it.
        loader: `open_split`'s.
        device: Where a checkpoint's network runs.
        save_dir: Folder for what the validation writes.
        limits: `thresholds`'.
    """
    stored = isinstance(network, OnnxDetector)
    args = _arguments(data, split, loader.batch_size) | {"device": "cpu" if stored else device} | limits
    args |= {"imgsz": max(loader.dataset.imgsz), "plots": False, "verbose": False, "save_json": False}
    args["model"] = str(save_dir.name)
    made = GIDValidator(loader, save_dir, args)
    # Ultralytics fuses what it is given, and moves it to its device. TF32 is off, as it is for the file
    given = _OnnxNetwork(network) if isinstance(network, OnnxDetector) else deepcopy(network)
    cudnn = torch.backends.cudnn
    with (
        no_autoinstall(),
        cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False),
    ):
        made(model=given)
    assert made.columns is not None
    return made.columns


class _OnnxNetwork(nn.Module):
    """A file as Ultralytics' validator takes a foreign network: it would open the file on a provider of its own."""

    def __init__(self, detector: OnnxDetector) -> None:
        super().__init__()
        self.detector = detector
        self.names = dict(detector.names)
        self.stride = torch.tensor([detector.info.stride])
        self.end2end = detector.info.final

    def __deepcopy__(self, memo: dict[int, Any]) -> _OnnxNetwork:
        """Itself: a session cannot be copied, and nothing changes it."""
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) into (B, 4 + C, R) or (B, N, 6)."""
        return torch.from_numpy(self.detector.run(images.numpy()).astype(np.float32, copy=False))


def _arguments(data: Path, split: str, batch: int) -> dict[str, Any]:
    return {
        "task": "detect",
        "mode": "val",
        "data": str(data),
        "split": split,
        "batch": batch,
        "rect": False,
    }
