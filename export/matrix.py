"""Every model in every setting: its file, its gate, its accuracy, its times."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ultralytics.utils import LOGGER

from gid_yolo.engine.config import thresholds
from gid_yolo.export.evaluate import batches_of, spread, ten_columns
from gid_yolo.export.half import to_fp16
from gid_yolo.export.memory import peak_memory
from gid_yolo.export.parity import Contender, compare_outputs, compare_scores, export_onnx
from gid_yolo.export.preprocess import read_image
from gid_yolo.export.quantize import quantize_int8
from gid_yolo.export.rows import Detections, Example
from gid_yolo.export.session import OnnxDetector, open_session
from gid_yolo.export.timing import interleave, latency
from gid_yolo.export.to_onnx import Calibration

EXAMPLES = 4
EXAMPLE_CONF = 0.05  # the page shows detections from 0.1 on


@dataclass(frozen=True)
class Settings:
    """What each model is exported as, and how it is judged.

    Attributes:
        sizes: Heights and widths of the input.
        batches: Images a run.
        precisions: `fp32` first.
        images: Real images on which an FP32 file must equal PyTorch.
        threads: Of onnxruntime's operators.
        cuda: The GPU, or None for the CPU.
        max_ap_drop: Points of mAP that a lower precision may lose.
    """

    sizes: Sequence[Sequence[int]]
    batches: Sequence[int]
    precisions: Sequence[str]
    images: int
    threads: int
    cuda: int | None
    max_ap_drop: float


def make_cells(
    networks: Sequence[Contender],
    settings: Settings,
    loaders: Mapping[tuple[int, ...], Any],
    evaluation: dict[str, Any],
) -> list[Contender]:
    """Every model in every setting: exported, compared with PyTorch, and its accuracy measured.

    Accuracy is measured once a size and precision, at the first batch: a file's batch changes neither its weights nor
    its ranges.

    Args:
        networks: The models.
        settings: The settings.
        loaders: The split's images for each size.
        evaluation: `data`, `split` and `save_dir` of `ten_columns`.
    """
    cells: list[Contender] = []
    for network, size, batch in itertools.product(networks, settings.sizes, settings.batches):
        loader = loaders[tuple(size)]
        measured = {cell.precision: cell for cell in reversed(cells) if (cell.role, cell.size) == (network.role, size)}
        full = replace(network, batch=batch, size=size)
        cells.append(full)
        _full_precision(full, measured.get("fp32"), settings, evaluation | {"loader": loader})
        for precision in settings.precisions[1:]:
            cell = replace(network, batch=batch, size=size, precision=precision)
            cells.append(cell)
            _lower_precision(cell, full, measured.get(precision), settings, evaluation | {"loader": loader})
    return cells


def _full_precision(
    cell: Contender, measured: Contender | None, settings: Settings, evaluation: dict[str, Any]
) -> None:
    size = f"_{cell.size[0]}x{cell.size[1]}" if len(settings.sizes) > 1 else ""
    name = cell.role + size + (f"_b{cell.batch}" if len(settings.batches) > 1 else "")
    folder, loader = evaluation["save_dir"], evaluation["loader"]
    cell.onnx = export_onnx(cell.model, folder / f"{name}.onnx", list(cell.size), cell.batch)
    cell.session = open_session(cell.onnx, threads=settings.threads, cuda=settings.cuda)
    compare_outputs(cell, batches_of(loader.dataset, settings.images, cell.batch))
    cell.session = None  # it is opened anew for timing
    if cell.failed is None and measured is None:
        compare_scores(cell, evaluation["data"], evaluation["split"], loader, settings.cuda, folder)
    elif cell.failed is None and measured is not None:
        cell.ap, cell.columns, cell.failed = measured.ap, measured.columns, measured.failed


def _lower_precision(
    cell: Contender, full: Contender, measured: Contender | None, settings: Settings, evaluation: dict[str, Any]
) -> None:
    if full.failed is not None or full.columns is None:
        cell.onnx, cell.failed = full.onnx, "its fp32 file failed"
        return
    cell.onnx = full.onnx.with_name(f"{full.onnx.stem}_{cell.precision}.onnx")
    if cell.precision == "int8":
        quantize_int8(full.onnx, cell.onnx, Calibration(evaluation["data"], cell.size, cell.batch))
    else:
        to_fp16(full.onnx, cell.onnx)
    if measured is not None:
        cell.drop, cell.columns, cell.failed = measured.drop, measured.columns, measured.failed
        return
    LOGGER.info(f"{cell.role} ({cell.precision}):")
    columns = ten_columns(
        cell.onnx,
        **{**evaluation, "save_dir": evaluation["save_dir"] / f"{cell.onnx.stem}_onnx"},
        device="cpu" if settings.cuda is None else settings.cuda,
        limits=thresholds(cell.model.yaml),
    )
    cell.drop = full.columns["mAP"] - columns["mAP"]
    if cell.drop > settings.max_ap_drop:
        cell.failed = f"mAP is {cell.drop:.2f} lower than in fp32 (limit {settings.max_ap_drop:g})"
    else:
        cell.columns = columns


def measure_times(
    cells: Sequence[Contender],
    loaders: Mapping[tuple[int, ...], Any],
    *,
    images: int,
    warmup: int,
    runs: int,
    rounds: int,
    threads: int,
    cuda: int | None,
) -> None:
    """Time preparation, network and post-processing of all cells apart, each in turns with the others.

    Post-processing is that of deployment: detections from a score of 0.25 on, as `yolo predict` gives them.
    """
    if not cells:
        return
    provider = "cpu" if cuda is None else f"cuda:{cuda}"
    names = [str(i) for i in range(len(cells))]
    detectors = [OnnxDetector(cell.onnx, provider=provider, threads=threads) for cell in cells]
    originals, inputs, outputs = [], [], []
    for cell, detector in zip(cells, detectors, strict=True):
        dataset = loaders[tuple(cell.size)].dataset
        pictures = [read_image(dataset.im_files[i]) for i in spread(len(dataset), images)]
        pictures += [pictures[i % len(pictures)] for i in range(-len(pictures) % cell.batch)]
        originals.append([pictures[i : i + cell.batch] for i in range(0, len(pictures), cell.batch)])
        inputs.append(batches_of(dataset, images, cell.batch))
        outputs.append([detector.run(batch) for batch in inputs[-1]])
    turns = list(range(max(map(len, inputs))))

    def timed(calls: list[Any], count: int) -> dict[str, list[float]]:
        return interleave(dict(zip(names, calls, strict=True)), turns, warmup=warmup, runs=count, rounds=rounds)  # type: ignore[arg-type]

    network = timed([partial(_network, d, x) for d, x in zip(detectors, inputs, strict=True)], runs)
    before = timed([partial(_before, d, x) for d, x in zip(detectors, originals, strict=True)], runs)
    places = zip(detectors, outputs, originals, cells, strict=True)
    after = timed([partial(_after, d, y, x, cell.size) for d, y, x, cell in places], runs)
    for name, cell in zip(names, cells, strict=True):
        cell.latency = latency(network[name], cell.batch)
        cell.preprocess, cell.postprocess = float(np.median(before[name])), float(np.median(after[name]))
        cell.memory = peak_memory(cell.onnx, provider, threads)


def _network(detector: OnnxDetector, batches: list[np.ndarray], turn: int) -> None:
    detector.run(batches[turn % len(batches)])


def _before(detector: OnnxDetector, images: list[list[np.ndarray]], turn: int) -> None:
    detector.prepare(images[turn % len(images)])


def _after(
    detector: OnnxDetector, outputs: list[np.ndarray], images: list[list[np.ndarray]], size: Sequence[int], turn: int
) -> None:
    place = turn % len(outputs)
    detector.finish(outputs[place], size, [image.shape for image in images[place]])


def make_examples(cells: Sequence[tuple[str, Contender]], dataset: Any, names: dict[int, str]) -> tuple[Example, ...]:
    """Some images of the split with their objects and with what each model's file finds on them.

    Args:
        cells: The label and the FP32 cell of each model, of one setting.
        dataset: Ultralytics' data set of the split.
        names: Of the classes.
    """
    detectors = {}
    for label, cell in cells:
        limits = thresholds(cell.model.yaml)
        detectors[label] = OnnxDetector(
            cell.onnx, provider="cpu", conf=EXAMPLE_CONF, iou=limits["iou"], max_det=limits["max_det"]
        )
    examples = []
    for i in spread(len(dataset), EXAMPLES):
        image, label = read_image(dataset.im_files[i]), dataset.labels[i]
        height, width = image.shape[:2]
        centre, half = label["bboxes"][:, :2], label["bboxes"][:, 2:] / 2
        boxes = np.concatenate([centre - half, centre + half], axis=1) * [width, height, width, height]
        found = {}
        for name, detector in detectors.items():
            (seen,) = detector(image)
            found[name] = Detections(seen.boxes, seen.scores, seen.classes)
        examples.append(
            Example(
                name=Path(dataset.im_files[i]).name,
                image=np.ascontiguousarray(image[..., ::-1]),
                true_boxes=boxes.reshape(-1, 4),
                true_classes=label["cls"].reshape(-1).astype(np.int64),
                detections=found,
                names=names,
            )
        )
    return tuple(examples)
