"""The models of a benchmark: checkpoints that it exports itself, and ONNX files beside them."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from ultralytics.nn.tasks import DetectionModel

from gid_yolo.engine.checkpoint import fingerprint, load_model
from gid_yolo.engine.classes import fit_classes
from gid_yolo.engine.config import thresholds
from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.errors import UserError
from gid_yolo.export.budget import distilled, training_of
from gid_yolo.export.metadata import FileInfo, check_names
from gid_yolo.export.providers import check_provider
from gid_yolo.export.rows import Row
from gid_yolo.export.session import OnnxDetector
from gid_yolo.export.timing import Latency

_INTEGER_NODES = {"QuantizeLinear", "DequantizeLinear", "QLinearConv", "ConvInteger", "MatMulInteger"}
_TAKEN = {"model", "distilled", "plain", "teacher"}


@dataclass
class Contender:
    """A model in one setting on its way through the benchmark; `Row` says what its measurements mean.

    Attributes:
        role: `model`, `baseline`, `teacher` or `other`.
        label: What the table calls it.
        path: The checkpoint, or the ONNX file that was given.
        fingerprint: Of its weights, or of the file.
        limits: `conf`, `iou` and `max_det` that it is evaluated with.
        model: The checkpoint's network; None for an ONNX file.
        record: How it was trained, see `training_of`; empty where nothing says it.
        info: What the ONNX file says of itself; None for a checkpoint.
        provider: As for `providers.start`.
        size: Height and width.
        onnx: The file to measure.
        matches: Which of its detections were right, as `write_matches` writes it.
    """

    role: str
    label: str
    path: Path
    fingerprint: str
    limits: dict[str, Any]
    model: DetectionModel | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    info: FileInfo | None = None
    precision: str = "fp32"
    provider: str = "cpu"
    batch: int = 1
    size: Sequence[int] = ()
    onnx: Path = field(default_factory=Path)
    parameters: float | None = None
    gflops: float | None = None
    boxes: float | None = None
    scores: float | None = None
    ap: float | None = None
    drop: float | None = None
    columns: dict[str, float] | None = None
    matches: Path | None = None
    preprocess: float | None = None
    postprocess: float | None = None
    memory: float | None = None
    latency: Latency | None = None
    failed: str | None = None
    compared: bool = True
    judged: bool = True

    @property
    def network(self) -> DetectionModel:
        """The checkpoint's; an error for an ONNX file."""
        if self.model is None:
            raise ValueError(f"{self.path} is no checkpoint")
        return self.model

    @property
    def stride(self) -> int:
        """What height and width must be multiples of."""
        return self.info.stride if self.info is not None else int(self.network.stride.max())

    @property
    def slug(self) -> str:
        """Its name in the names of files."""
        if self.role != "other":
            return self.role
        digest = hashlib.sha256(self.label.encode()).hexdigest()[:6]  # two labels may differ in what a name cannot hold
        return f"other-{re.sub(r'[^a-zA-Z0-9]+', '-', self.label)}-{digest}"

    def places(self, sizes: Sequence[Sequence[int]], batches: Sequence[int]) -> list[tuple[list[int], int]]:
        """The sizes and batches to measure it in: those asked for, or what a file of a fixed shape takes alone."""
        if self.info is None:
            return [(list(size), batch) for size, batch in itertools.product(sizes, batches)]
        most = self.info.most
        chosen = [batch for batch in batches if most is None or batch <= most] or [self.info.batch]
        own_sizes = [self.info.size] if self.info.fixed_size else sizes
        own_batches = [self.info.batch] if self.info.fixed_batch else chosen
        return [(list(size), batch) for size, batch in itertools.product(own_sizes, own_batches)]

    def row(self) -> Row:
        """What was measured."""
        ours = isinstance(self.model, GIDDetectionModel)
        named = "" if self.model is None else Path(self.model.yaml.get("yaml_file") or "custom").stem
        return Row(
            role=self.role,
            label=self.label,
            name=named,
            backbone="" if self.model is None else str(self.model.yaml["backbone"]) if ours else "its own",
            precision=self.precision,
            provider=check_provider(self.provider),
            batch=self.batch,
            height=self.size[0],
            width=self.size[1],
            parameters=self.parameters,
            gflops=self.gflops,
            file_size=self.onnx.stat().st_size / 1e6 if self.onnx.is_file() else None,
            **({} if self.latency is None else asdict(self.latency)),
            preprocess=self.preprocess,
            postprocess=self.postprocess,
            memory=self.memory,
            columns=self.columns,
            box_difference=self.boxes,
            score_difference=self.scores,
            ap_difference=self.ap,
            ap_drop=self.drop,
            failed=self.failed,
            compared=self.compared,
            judged=self.judged,
        )


@contextmanager
def failing(cell: Contender) -> Iterator[None]:
    """A file that does not run on a provider, or answers with no numbers, has failed: the others go on."""
    try:
        yield
    except UserError as error:
        cell.failed = str(error).rstrip(".")


def weigh(model: DetectionModel, size: Sequence[int]) -> tuple[float, float]:
    """Millions of parameters, batch normalisation folded, and `gigaflops`."""
    fused = deepcopy(model).fuse(verbose=False)
    return sum(p.numel() for p in fused.parameters()) / 1e6, gigaflops(fused, size)


def gigaflops(network: nn.Module, size: Sequence[int]) -> float:
    """Billions of operations of an image of noise, a multiplication and an addition being two.

    Counted at its own size: Ultralytics' count is extrapolated from smaller images, which the second stage of a Faster
    R-CNN, that works on the proposals there are, does not allow.

    Args:
        network: In evaluation mode, on the CPU.
        size: Height and width.
    """
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(image)
    return counter.get_total_flops() / 1e9


def load_checkpoint(role: str, path: str | Path, label: str | None = None, trust: bool = False) -> Contender:
    """A checkpoint for one of the benchmark's arguments; `trust` as for `load_model`.

    Raises:
        UserError: It cannot be loaded.
    """
    if Path(path).suffix.lower() == ".onnx":
        raise UserError(
            f"{role}={path} is an ONNX file: give the checkpoint it was made from, or the file as others={path}."
        )
    network, checkpoint = load_model(path, "others" if role == "other" else role, trust)
    record = training_of(network, checkpoint)
    labels = {"model": "distilled" if distilled(record) else "model", "baseline": "plain"}
    return Contender(
        role,
        label or labels.get(role, role),
        Path(path),
        fingerprint(network),
        thresholds(network.yaml),
        model=network,
        record=record,
    )


def load_contenders(
    roles: Mapping[str, str | Path | None], others: Sequence[str | Path], trust: bool = False
) -> list[Contender]:
    """The checkpoints of `model=`, `baseline=` and `teacher=`, as far as they are given, and the other files.

    Raises:
        UserError: One cannot be loaded.
    """
    given = {role: path for role, path in roles.items() if path is not None}
    return [load_checkpoint(role, path, trust=trust) for role, path in given.items()] + load_others(others, trust)


def load_others(paths: Sequence[str | Path], trust: bool = False) -> list[Contender]:
    """Checkpoints and ONNX files to measure beside the three, each under a name of its own.

    Raises:
        UserError: One that cannot be read, is neither, or is given twice.
    """
    found = []
    for path, label in zip(map(Path, paths), _labels([Path(path) for path in paths]), strict=True):
        if path.suffix.lower() != ".onnx":
            found.append(load_checkpoint("other", path, label, trust))
            continue
        info = OnnxDetector(path, provider="cpu", threads=1).info
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        found.append(
            Contender(
                role="other",
                label=label,
                path=path,
                fingerprint=digest,
                limits=dict(info.limits),
                info=info,
                precision=stored_precision(path),
                compared=False,
            )
        )
    return found


def _labels(paths: Sequence[Path]) -> list[str]:
    """A file's name, or its run's for `run/weights/best.pt`, with as many folders before it as tell it from others."""
    places = [path.resolve() for path in paths]
    if twice := [str(path) for path, place in zip(paths, places, strict=True) if places.count(place) > 1]:
        raise UserError(f"others= has {twice[0]} more than once.")
    parts = []
    for place in places:
        run = place.stem in {"best", "last"} and place.parent.name == "weights"
        parts.append(place.parent.parent.parts if run else (*place.parent.parts, place.stem))
    for i in [i for i, part in enumerate(parts) if parts.count(part) > 1]:  # best.pt and best.onnx of one run
        name, file = parts[i][-1], places[i].name
        parts[i] = (*parts[i][:-1], file if file.startswith(name) else f"{name} {file}")
    longest = max(map(len, parts), default=0)
    for depth in range(1, longest + 1):
        labels = ["other " * (name in _TAKEN) + name for name in ("/".join(part[-depth:]) for part in parts)]
        if len(set(labels)) == len(labels):
            break
    return labels if parts else []


def stored_precision(path: Path) -> str:
    """`int8` for a file with quantised layers, `fp16` for one whose weights are mostly so, else `fp32`."""
    graph = onnx.load(path, load_external_data=False).graph
    if any(node.op_type in _INTEGER_NODES for node in graph.node):
        return "int8"
    half = total = 0
    for weight in graph.initializer:
        count = 1
        for side in weight.dims:
            count *= side
        total += count
        half += count * (weight.data_type == onnx.TensorProto.FLOAT16)
    return "fp16" if 2 * half > total else "fp32"


def fit_to(contender: Contender, names: Mapping[int, str], data: Any) -> None:
    """Give a checkpoint the data's classes in their order; of a file, see that it has them.

    Raises:
        UserError: Other classes.
    """
    argument = "others" if contender.role == "other" else contender.role
    if contender.model is not None:
        contender.model = fit_classes(contender.model, names, f"{argument}={contender.path}", data)
    elif contender.info is not None:
        check_names(contender.info, names, f"{argument}={contender.path}", data)
