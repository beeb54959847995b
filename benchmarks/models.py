"""Size and speed of every model that ships: parameters, GFLOPs, and the latency of its ONNX file on one CPU thread.

The weights are random, which changes no figure of the dense detectors; a trained Faster R-CNN keeps other proposals, of
which there are as many at most. Prints a Markdown table:

    python benchmarks/models.py [--models retina_nano fcos_nano] [--sizes 320 640] [--classes 80]
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import get_cpu_info

from gid_yolo.cfg import model_names
from gid_yolo.engine.config import DEFAULTS
from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.export.contenders import gigaflops
from gid_yolo.export.parity import export_onnx
from gid_yolo.export.session import open_session, run
from gid_yolo.export.timing import interleave


def row(name: str, sizes: list[int], classes: int, runs: int) -> list[str]:
    model = GIDDetectionModel(name, nc=classes, verbose=False).eval()
    model.names = {i: str(i) for i in range(classes)}
    model.args, model.pt_path = dict(DEFAULTS), f"{name}.pt"  # as a loaded checkpoint has them
    cells = [name, str(model.yaml["backbone"])]
    fused = model.fuse(verbose=False)
    cells.append(f"{sum(p.numel() for p in fused.parameters()) / 1e6:.2f}")
    flops, latencies = [], []
    for size in sizes:
        flops.append(f"{gigaflops(fused, [size, size]):.1f}")
        with tempfile.TemporaryDirectory() as folder:
            session = open_session(export_onnx(model, Path(folder) / f"{name}.onnx", [size, size], batch=1))
            images = np.random.default_rng(0).random((1, 3, size, size), dtype=np.float32)
            times = interleave({name: partial(run, session)}, [images], warmup=2, runs=runs, rounds=1)[name]
        latencies.append(f"{np.median(times):.0f}")
    return [*cells, *flops, *latencies]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=model_names())
    parser.add_argument("--sizes", nargs="+", type=int, default=[320, 640])
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    LOGGER.setLevel("ERROR")
    head = ["model", "backbone", "params M"]
    head += [f"GFLOPs {size}" for size in options.sizes] + [f"ms {size}" for size in options.sizes]
    print(
        f"{get_cpu_info()}, 1 thread, onnxruntime, fp32, batch 1, {options.classes} classes, median of {options.runs}\n"
    )
    print("| " + " | ".join(head) + " |\n|" + " --- | --- |" + " ---: |" * (len(head) - 2), flush=True)
    for name in options.models:
        print("| " + " | ".join(row(name, options.sizes, options.classes, options.runs)) + " |", flush=True)


if __name__ == "__main__":
    main()
