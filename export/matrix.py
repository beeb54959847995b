"""Every model in every setting: its file, its gate, its accuracy."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ultralytics.utils import LOGGER

from gid_yolo.engine.matches import FILE
from gid_yolo.errors import UserError
from gid_yolo.export.contenders import Contender, failing, weigh
from gid_yolo.export.evaluate import batches_of, ten_columns
from gid_yolo.export.half import to_fp16
from gid_yolo.export.parity import compare_outputs, compare_scores, export_onnx
from gid_yolo.export.quantize import quantize_int8
from gid_yolo.export.session import OnnxDetector
from gid_yolo.export.to_onnx import Calibration


@dataclass(frozen=True)
class Settings:
    """What each model is exported as, and how it is judged.

    Attributes:
        sizes: Heights and widths of the input.
        batches: Images a run.
        precisions: `fp32` first.
        providers: As for `providers.start`.
        images: Real images on which an FP32 file must equal PyTorch.
        threads: Of onnxruntime's operators, while time is taken.
        max_ap_drop: Points of mAP that a lower precision may lose.
        trust: The data's yaml may run a program.
    """

    sizes: Sequence[Sequence[int]]
    batches: Sequence[int]
    precisions: Sequence[str]
    providers: Sequence[str]
    images: int
    threads: int
    max_ap_drop: float
    trust: bool = False

    @property
    def device(self) -> str:
        """Where PyTorch runs: on the GPU that onnxruntime uses, where it knows one."""
        if not torch.cuda.is_available():
            return "cpu"
        return next((f"cuda:{p.partition(':')[2] or 0}" for p in self.providers if p[:4] in {"cuda", "tens"}), "cpu")


class Matrix:
    """Every model in every setting: exported, compared with PyTorch, and its accuracy measured.

    Accuracy is measured once a size, precision and provider, at the first batch: a file's batch changes neither its
    weights nor its ranges.
    """

    def __init__(
        self, settings: Settings, loaders: Mapping[tuple[int, ...], Any], data: Path, split: str, save_dir: Path
    ) -> None:
        self.settings, self.loaders, self.save_dir = settings, loaders, save_dir
        self.data, self.split = data, split
        self._known: dict[tuple[Any, ...], tuple[dict[str, float], Path]] = {}
        self._weights: dict[tuple[Any, ...], tuple[float, float]] = {}
        self._files: dict[Path, UserError | None] = {}  # why there is none

    def cells(self, contenders: Sequence[Contender]) -> list[Contender]:
        """The contenders, each in its settings.

        Args:
            contenders: The models, in the order to show.
        """
        found: list[Contender] = []
        for contender in contenders:
            for (size, batch), provider in itertools.product(
                contender.places(self.settings.sizes, self.settings.batches), self.settings.providers
            ):
                cell = replace(contender, size=size, batch=batch, provider=provider)
                found += [self._alone(cell)] if cell.model is None else self._exported(cell)
        return found

    def _alone(self, cell: Contender) -> Contender:
        """An ONNX file that was given: there is nothing to compare it with."""
        cell.onnx = cell.path
        with failing(cell):
            cell.columns = self._columns(cell)
        return cell

    def _exported(self, full: Contender) -> list[Contender]:
        """A checkpoint's FP32 file, and the lower precisions made of it."""
        settings = self.settings
        size = f"_{full.size[0]}x{full.size[1]}" if len(settings.sizes) > 1 else ""
        name = full.slug + size + (f"_b{full.batch}" if len(settings.batches) > 1 else "")
        full.onnx = self.save_dir / f"{name}.onnx"
        full.parameters, full.gflops = self._weight(full)
        with failing(full):
            self._make(full.onnx, partial(export_onnx, full.network, full.onnx, list(full.size), full.batch))
            compare_outputs(full, batches_of(self._loader(full).dataset, settings.images, full.batch))
            if full.failed is None:
                compare_scores(full, self._checkpoint_columns(full), self._columns(full))
        return [full, *(self._lower(full, precision) for precision in settings.precisions[1:])]

    def _lower(self, full: Contender, precision: str) -> Contender:
        file = full.onnx.with_name(f"{full.onnx.stem}_{precision}.onnx")
        cell = replace(
            full, precision=precision, onnx=file, boxes=None, scores=None, ap=None, columns=None, compared=True
        )
        if full.columns is None:
            cell.onnx, cell.failed = full.onnx, "its fp32 file failed"
            return cell
        with failing(cell):
            self._make(file, partial(self._convert, full, file))
            columns = self._columns(cell)
            cell.judged = full.columns["mAP"] > self.settings.max_ap_drop  # else not even 0 would be too little
            cell.drop = full.columns["mAP"] - columns["mAP"]
            if not cell.drop <= self.settings.max_ap_drop:
                cell.failed = f"mAP is {cell.drop:.2f} lower than in fp32 (limit {self.settings.max_ap_drop:g})"
            else:
                cell.columns = columns
        return cell

    def _convert(self, full: Contender, file: Path) -> None:
        if file.stem.endswith("_int8"):
            quantize_int8(full.onnx, file, Calibration(self.data, full.size, full.batch, trust=self.settings.trust))
        else:
            to_fp16(full.onnx, file, batches_of(self._loader(full).dataset, self.settings.images, full.batch)[0])

    def _make(self, file: Path, make: Callable[[], Any]) -> None:
        """Write a file at the first call: another provider runs the same one, or fails of the same."""
        if file not in self._files:
            try:
                make()
                self._files[file] = None
            except UserError as error:
                self._files[file] = error
        if (problem := self._files[file]) is not None:
            raise problem

    def _weight(self, cell: Contender) -> tuple[float, float]:
        """Millions of parameters, billions of operations."""
        key = (cell.slug, *cell.size)
        if key not in self._weights:
            self._weights[key] = weigh(cell.network, cell.size)
        return self._weights[key]

    def _columns(self, cell: Contender) -> dict[str, float]:
        """A file's ten columns; where its matches lie is noted in the cell.

        Raises:
            UserError: It does not run, or what it gives are no numbers.
        """
        several = len(self.settings.providers) > 1
        place = f"{cell.onnx.stem}_onnx" + f"_{cell.provider.replace(':', '')}" * several
        key = (cell.slug, cell.precision, cell.provider, *cell.size)
        if key not in self._known:
            LOGGER.info(f"{cell.label} ({cell.precision}, {cell.provider}):")
            detector = OnnxDetector(cell.onnx, provider=cell.provider, imgsz=cell.size, batch=cell.batch)
            for images in batches_of(self._loader(cell).dataset, self.settings.images, cell.batch):
                detector.finish(detector.run(images), cell.size, [cell.size] * len(images))  # refuses NaN
            self._known[key] = self._measure(detector, cell, place), self.save_dir / place / FILE
        columns, cell.matches = self._known[key]
        return dict(columns)

    def _checkpoint_columns(self, cell: Contender) -> dict[str, float]:
        key = (cell.slug, *cell.size)
        if key not in self._known:
            LOGGER.info(f"{cell.label} (PyTorch):")
            place = f"{cell.onnx.stem}_pt"
            self._known[key] = self._measure(cell.network, cell, place), self.save_dir / place / FILE
        return dict(self._known[key][0])

    def _measure(self, network: Any, cell: Contender, place: str) -> dict[str, float]:
        return ten_columns(
            network,
            data=self.data,
            split=self.split,
            loader=self._loader(cell),
            device=self.settings.device,
            save_dir=self.save_dir / place,
            limits=cell.limits,
        )

    def _loader(self, cell: Contender) -> Any:
        return self.loaders[tuple(cell.size)]
