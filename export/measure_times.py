"""The times of all files of a benchmark, taken in turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from gid_yolo.export.contenders import Contender, failing
from gid_yolo.export.evaluate import batches_of, spread
from gid_yolo.export.memory import peak_memory
from gid_yolo.export.preprocess import read_image
from gid_yolo.export.session import OnnxDetector
from gid_yolo.export.timing import interleave, latency


def measure_times(
    cells: Sequence[Contender],
    loaders: Mapping[tuple[int, ...], Any],
    *,
    images: int,
    warmup: int,
    runs: int,
    rounds: int,
    threads: int,
) -> None:
    """Time preparation, network and post-processing of all cells apart, each in turns with the others.

    Post-processing is that of deployment: detections from a score of 0.25 on, as `yolo predict` gives them.
    """
    detectors, originals, inputs, outputs, running = [], [], [], [], []
    for cell in cells:
        with failing(cell):  # all of them are open together, which the memory may be too small for
            options: dict[str, Any] = {
                "provider": cell.provider,
                "threads": threads,
                "imgsz": cell.size,
                "batch": cell.batch,
            }
            detector = OnnxDetector(cell.onnx, **options, rect=False)
            dataset = loaders[tuple(cell.size)].dataset
            pictures = [read_image(dataset.im_files[i]) for i in spread(len(dataset), images)]
            pictures += [pictures[i % len(pictures)] for i in range(-len(pictures) % cell.batch)]
            batches = batches_of(dataset, images, cell.batch)
            outputs.append([detector.run(batch) for batch in batches])
            originals.append([pictures[i : i + cell.batch] for i in range(0, len(pictures), cell.batch)])
            inputs.append(batches)
            detectors.append(detector)
            running.append(cell)
    cells, names = running, [str(i) for i in range(len(running))]
    if not cells:
        return
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
        cell.memory = peak_memory(cell.onnx, cell.provider, threads, (cell.batch, 3, *cell.size))


def _network(detector: OnnxDetector, batches: list[np.ndarray], turn: int) -> None:
    detector.run(batches[turn % len(batches)])


def _before(detector: OnnxDetector, images: list[list[np.ndarray]], turn: int) -> None:
    detector.prepare(images[turn % len(images)])


def _after(
    detector: OnnxDetector, outputs: list[np.ndarray], images: list[list[np.ndarray]], size: Sequence[int], turn: int
) -> None:
    place = turn % len(outputs)
    detector.finish(outputs[place], size, [image.shape for image in images[place]])
