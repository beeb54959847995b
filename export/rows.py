"""What a benchmark measured: one row for one model in one setting, and images with what the models find on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from gid_yolo.engine.coco_eval import COLUMNS

# What a file that failed its gate has not: a fast wrong answer is no result
_RESULTS = (
    *("preprocess", "p50", "p95", "p99", "postprocess", "images_per_second", "memory", "columns"),
    *("gain_low", "gain_high", "gain_certain"),
)


class Setting(NamedTuple):
    """What two rows must share for their latencies to be compared."""

    precision: str
    provider: str
    batch: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.precision}, {short(self.provider)}, batch {self.batch}, {self.height}x{self.width}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model in one setting. What was measured after it failed a gate is None: it would be no result.

    Attributes:
        role: `model`, `baseline` or `teacher`, the argument that named it; `other` for a file beside these.
        label: What it is: `distilled`, `plain`, `teacher`, `model` where it was not distilled, or a file's stem.
        name: Its yaml; empty where unknown.
        backbone: timm's name; empty where unknown.
        precision: `fp32`, `fp16` or `int8`.
        provider: onnxruntime's execution provider.
        batch: Images per run of the network.
        height: Of the input, in pixels; width likewise.
        parameters: Millions, batch normalisation folded; None where unknown, as in a foreign ONNX file.
        gflops: Of one image; None where they could not be counted.
        file_size: Of the ONNX file, in MB (1e6 bytes); None where it could not be made.
        preprocess: Median milliseconds per batch to make the network's input, timed apart; postprocess likewise.
        p50: Median milliseconds per batch of the network alone; p95 and p99 likewise.
        images_per_second: Of the network alone, over all timed runs.
        memory: Peak MB of the network's process above its start.
        columns: The paper's ten columns in percent, by onnxruntime; -1 for a size range without objects.
        gain_low: Lower end of the 95 % interval, over images, of the mAP that a `model` is ahead of its baseline in the
            same setting; gain_high likewise. None of other roles, and where it is not known.
        gain_certain: Whether that interval leaves 0 out, of images enough to say so; None likewise.
        box_difference: Largest difference from PyTorch's boxes in pixels; None where not compared.
        score_difference: Likewise of class probabilities.
        ap_difference: mAP of the ONNX file minus that of the checkpoint; None where it was not reached.
        ap_drop: mAP of the same model's fp32 file minus this one's; None for fp32.
        failed: Why the file's results do not count, or None.
        compared: False where there was nothing to compare, so that nothing is known of its equality.
        judged: False of a lower precision whose fp32 file finds so little that no loss would be too much.
    """

    role: str
    label: str
    name: str
    backbone: str
    precision: str = "fp32"
    provider: str = "CPUExecutionProvider"
    batch: int = 1
    height: int
    width: int
    parameters: float | None = None
    gflops: float | None = None
    file_size: float | None
    preprocess: float | None = None
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None
    postprocess: float | None = None
    images_per_second: float | None = None
    memory: float | None = None
    columns: dict[str, float] | None = None
    gain_low: float | None = None
    gain_high: float | None = None
    gain_certain: bool | None = None
    box_difference: float | None = None
    score_difference: float | None = None
    ap_difference: float | None = None
    ap_drop: float | None = None
    failed: str | None = None
    compared: bool = True
    judged: bool = True

    @property
    def setting(self) -> Setting:
        """Precision, provider, batch and size."""
        return Setting(self.precision, self.provider, self.batch, self.height, self.width)

    @property
    def key(self) -> tuple[str, str, Setting]:
        """What no two rows of a report share."""
        return self.role, self.label, self.setting

    @property
    def title(self) -> str:
        """The model in words, without saying one thing twice."""
        parts = (self.name or self.label,) if self.label == self.role == "model" else (self.label, self.name)
        return " ".join(dict.fromkeys(part for part in parts if part))

    @property
    def size(self) -> str:
        """Height x width."""
        return f"{self.height}x{self.width}"

    @property
    def parity(self) -> str:
        """Whether it passed its gate: fp32 as the checkpoint's equal, a lower precision by the mAP it lost."""
        if self.failed:
            return "FAILED"
        return "not compared" if not self.compared else "ok" if self.judged else "not judged"

    @property
    def ap(self) -> float | None:
        """The mAP in percent, or None where there is none to compare."""
        found = self.columns.get("mAP", -1.0) if self.columns and self.failed is None else -1.0
        return found if found >= 0 else None

    @property
    def gain_interval(self) -> str:
        """From `gain_low` to `gain_high` in words; empty where it is not known."""
        if self.gain_low is None or self.gain_high is None or self.failed:
            return ""
        return f"{signed(self.gain_low)} to {signed(self.gain_high)}"

    @property
    def per_image(self) -> float | None:
        """Median milliseconds of the network for one image, or None where there is no result."""
        return self.p50 / self.batch if self.p50 and self.failed is None else None

    @property
    def end_to_end(self) -> float | None:
        """Images per second with preprocessing and postprocessing, one after the other."""
        if not self.images_per_second or self.preprocess is None or self.postprocess is None or self.failed:
            return None
        network = 1e3 * self.batch / self.images_per_second  # the mean, so that this is never more than it alone
        total = self.preprocess + network + self.postprocess
        return 1e3 * self.batch / total if total > 0 else None

    def record(self) -> dict[str, Any]:
        """Every field and what follows from them, under the names of the JSON file; no results of a failed row."""
        values = asdict(self) | (dict.fromkeys(_RESULTS) if self.failed else {})
        return values | {"parity": self.parity, "per_image": self.per_image, "end_to_end": self.end_to_end}

    def flat(self) -> dict[str, Any]:
        """`record` with each of the ten columns under a name of its own, as in the CSV file."""
        values: dict[str, Any] = {}
        for name, value in self.record().items():
            if name == "columns":
                values |= {column: value.get(column) if value else None for column in COLUMNS}
            else:
                values[name] = value
        return values


@dataclass(frozen=True, eq=False)
class Detections:
    """What one model finds on one image.

    Attributes:
        boxes: (N, 4) xyxy in pixels of the example's image.
        scores: (N,).
        classes: (N,).
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray


@dataclass(frozen=True, eq=False)
class Example:
    """One image with its objects, and with what the fp32 files find on it.

    Attributes:
        name: Of the image file.
        image: (H, W, 3) RGB, uint8, of any size; the page makes it smaller.
        true_boxes: (M, 4) xyxy in pixels of `image`.
        true_classes: (M,).
        detections: By the rows' labels, in the order to show them.
        names: The classes' names.
    """

    name: str
    image: np.ndarray
    true_boxes: np.ndarray
    true_classes: np.ndarray
    detections: Mapping[str, Detections]
    names: Mapping[int, str]


def short(provider: str) -> str:
    """`CPU` for `CPUExecutionProvider`."""
    return provider.removesuffix("ExecutionProvider") or provider


def settings_of(rows: Sequence[Row]) -> list[Setting]:
    """Every setting once, in the rows' order."""
    return list(dict.fromkeys(row.setting for row in rows))


def signed(value: float) -> str:
    """A difference with its sign and one digit; no minus in front of 0."""
    return f"{round(value, 1) + 0.0:+.1f}"  # adding 0 turns -0.0 into 0.0
