"""The share of its time that a training waits for images, with the trainer's own loader and a GPU's step slept through.

    python benchmarks/data.py --imgsz 640 --batch 8 --workers 2 --rounds 5 --json out.json

- alone: images a second that the loader gives to a loop that does nothing else.
- CPU: milliseconds of a core for an image in the workers, which other load on the machine changes little.
- waiting: the share of a loop's time in which it has no batch, where a step is a sleep of so many seconds.
- beginning: the seconds until the first batch, in which the workers start.

The trainer builds data set and loader, with its default augmentation and seeds; its network is never run. A round has
every step with images read from the disk and with images kept in memory, in random order; each begins with what its
workers have prepared meanwhile, which is not counted. `--steps` are for a batch. What they stand for depends on
the GPU: 0.25 s for 8 images are 32 images a second.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import get_cpu_info

from gid_yolo.data.synthetic import synthetic_dataset
from gid_yolo.engine.seeding import start_epoch
from gid_yolo.engine.trainer import GIDTrainer

CACHES = {"disk": False, "ram": "ram"}
STARVED = 0.05  # the share of waiting that is too much


def training_loader(options: argparse.Namespace, cache: bool | str, folder: str) -> Any:
    """The loader of a training."""
    given = {key: vars(options)[key] for key in ("model", "data", "imgsz", "batch")}
    # A run of more than one epoch, so that nothing is turned off for its end
    trainer = GIDTrainer(overrides={**given, "cache": cache, "epochs": 100, "device": "cpu", "save_dir": folder})
    trainer.args.workers = options.workers  # which Ultralytics sets to 0 where it trains on a CPU
    trainer.setup_model()  # the data set is told the network's largest stride
    return trainer.get_dataloader(trainer.data["train"], options.batch, rank=-1, mode="train")


def batches_of(loader: Any) -> Iterator[dict[str, Any]]:
    """An epoch after the other, as a training has them."""
    for epoch in itertools.count():
        start_epoch(loader, epoch, attempt=0, goes_on=epoch > 0)
        yield from loader


def cpu_seconds(loader: Any) -> float:
    """Of the workers so far, or of this process where there are none."""
    workers = getattr(loader.iterator, "_workers", ())
    times = [psutil.Process(pid).cpu_times() for pid in [worker.pid for worker in workers] or [None]]
    return sum(spent.user + spent.system for spent in times)


def run(loader: Any, batches: Iterator[dict[str, Any]], step: float, skip: int, count: int) -> dict[str, float]:
    """Steps of so many seconds; of `count` after the first ones images a second, CPU time and the share of waiting."""
    waited, images, spent, began = 0.0, 0, 0.0, 0.0
    for number in range(skip + count):
        if number == skip:
            waited, images, spent, began = 0.0, 0, cpu_seconds(loader), time.perf_counter()
        asked = time.perf_counter()
        images += len(next(batches)["img"])
        waited += time.perf_counter() - asked
        if step:
            time.sleep(step)
    whole = time.perf_counter() - began
    cpu_ms = 1000 * (cpu_seconds(loader) - spent) / images
    return {"images_per_second": images / whole, "cpu_ms": cpu_ms, "waiting": waited / whole}


def spread(values: list[float]) -> dict[str, float]:
    """Least, median and largest."""
    return {"min": min(values), "median": median(values), "max": max(values)}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=None, help="images to decode; the embedded set, drawn at that size")
    parser.add_argument("--model", default="retina_nano", help="whose default augmentation is taken")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=float, nargs="+", default=[0.05, 0.1, 0.15, 0.2, 0.25], help="seconds")
    parser.add_argument("--batches", type=int, default=24, help="that are counted, of every step in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    LOGGER.setLevel("ERROR")
    if options.data is None:
        options.data = str(synthetic_dataset(image_size=options.imgsz, counts={"train": 128, "val": 8}))
    beginnings, streams, loaders, cells = {}, {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, cache in CACHES.items():
            loaders[name] = training_loader(options, cache, folder)
            streams[name] = batches_of(loaders[name])
            began = time.perf_counter()
            next(streams[name])
            beginnings[name] = time.perf_counter() - began
    skip = max(2, loaders["disk"].num_workers * (loaders["disk"].prefetch_factor or 0))  # what is prepared while idle
    turns = list(itertools.product(CACHES, [0.0, *options.steps]))
    for number in range(options.rounds):
        for name, step in random.Random(number).sample(turns, len(turns)):
            cells.setdefault((name, step), []).append(run(loaders[name], streams[name], step, skip, options.batches))
    for loader in loaders.values():
        loader.close()
    machine = get_cpu_info()
    settings = {key: value for key, value in vars(options).items() if key != "json"}
    settings |= {"machine": machine, "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__}
    settings["load"] = os.getloadavg()  # of which this is a part
    print(f"{options.data}, {options.batch} x {options.imgsz} px, {options.workers} workers, {machine}")
    print(f"  {settings['cores']} cores, load of the last minutes {', '.join(f'{x:.1f}' for x in settings['load'])}")
    found: dict[str, Any] = {}
    for name in CACHES:
        alone = spread([cell["images_per_second"] for cell in cells[name, 0.0]])
        cpu = spread([cell["cpu_ms"] for cell in cells[name, 0.0]])
        shares = {step: spread([cell["waiting"] for cell in cells[name, step]]) for step in options.steps}
        fed = [step for step in sorted(shares) if shares[step]["median"] <= STARVED]
        found[name] = {"alone": alone, "cpu_ms": cpu, "waiting": shares, "fed_from": fed[0] if fed else None}
        found[name]["beginning"] = beginnings[name]
        print(f"  {name}: first batch after {beginnings[name]:.1f} s")
        print(f"    alone           {alone['min']:7.1f} {alone['median']:7.1f} {alone['max']:7.1f} images/s")
        print(f"    CPU             {cpu['min']:7.1f} {cpu['median']:7.1f} {cpu['max']:7.1f} ms an image")
        for step, share in shares.items():
            row = " ".join(f"{100 * share[key]:7.2f}" for key in ("min", "median", "max"))
            print(f"    step {step:5.3f} s    {row} % waiting")
        said = f"from a step of {fed[0]} s on" if fed else "at none of these steps"
        print(f"    waiting is at most {100 * STARVED:g} % (median) {said}")
    if options.json:
        options.json.write_text(json.dumps({**found, "settings": settings}, indent=2) + "\n")


if __name__ == "__main__":
    main()
