"""The memory of a distilled step against what it cannot do without, and whether it grows from step to step.

    python benchmarks/memory.py --imgsz 320 --batch 8 --json out.json
    python benchmarks/memory.py --student retina_nano --teacher retina_small --imgsz 128 --growth 500

- plain: weights, momentum and batch of the student alone, and the most that a plain step holds beside them.
- teacher: the frozen teacher's weights.
- activations: the most that the teacher's pass holds, without gradients.
- gid: the same as plain, of a distilled step, with everything that is there besides.

The ratio is gid / (plain + teacher + activations). What a step holds is on a CPU the running sum of the allocator's
events, exact to the byte and with the temporaries inside operators, but without what oneDNN keeps for itself; on CUDA
it is `max_memory_allocated`.

`--growth N` makes N steps, and compares after a tenth of them and at their end: bytes of all tensors that Python
reaches, the resident memory of the process, and on CUDA `memory_allocated`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import torch
from step import Step
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import get_cpu_info

MB = 1e6


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages, each once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def held_by(run: Callable[[], None], device: str) -> int:
    """The most bytes that a call holds at one time, beside what was there before."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as made:
        run()
    events = [event for event in made.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))  # what is freed is negative


def with_momentum(step: Step, tensors: Iterable[Tensor]) -> list[Tensor]:
    """Weights, and the optimiser's state of those that are trained."""
    weights = list(tensors)
    state = [value for weight in weights for value in step.optimizer.state.get(weight, {}).values()]
    return weights + [value for value in state if isinstance(value, Tensor)]


def parts_of(step: Step) -> dict[str, int]:
    """Bytes by name, of models that have made a step of each kind."""
    weights = {name: [*x.parameters(), *x.buffers()] for name, x in (("student", step.student), ("both", step.model))}
    teacher = [*step.model.teacher_model.parameters(), *step.model.teacher_model.buffers()]
    batch = [value for value in step.batch.values() if isinstance(value, Tensor)]
    runs = {"plain": step.run_student, "activations": step.run_frozen_teacher, "gid": step.run_gid}
    held = {name: held_by(run, step.device) for name, run in runs.items()}
    return {
        "plain": size_of(with_momentum(step, weights["student"]) + batch) + held["plain"],
        "teacher": size_of(teacher),
        "activations": held["activations"],
        "gid": size_of(with_momentum(step, weights["both"]) + batch + teacher) + held["gid"],
    }


def alive(device: str) -> dict[str, int]:
    """Bytes of the tensors that Python reaches, and of the process or the device."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor) and x.layout == torch.strided]
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # glibc keeps what is freed for itself
    found = {"tensors": size_of(tensors), "resident": psutil.Process().memory_info().rss}
    return found if device == "cpu" else {**found, "allocated": torch.cuda.memory_allocated()}


def growth_of(step: Step, steps: int) -> list[dict[str, int]]:
    """What is alive after a tenth of the steps and after all."""
    early = max(1, steps // 10)
    found = []
    for count in (early, steps - early):
        for _ in range(count):
            step.run_gid()
        found.append(alive(step.device))
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="retina_mbv2")
    parser.add_argument("--teacher", default="retina_r50")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--growth", type=int, default=0, metavar="N", help="steps; 0 for none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", choices=("float16", "bfloat16"), default=None)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    LOGGER.setLevel("ERROR")
    models = {"classes": options.classes, "batch": options.batch, "size": options.imgsz}
    step = Step(options.student, options.teacher, **models, device=options.device, amp=options.amp)
    for run in (step.run_student, step.run_frozen_teacher, step.run_gid):  # momentum begins with the first step
        run()
    rounds = [parts_of(step) for _ in range(options.rounds)]
    ratios = [part["gid"] / (part["plain"] + part["teacher"] + part["activations"]) for part in rounds]
    ratio = {"min": min(ratios), "median": sorted(ratios)[len(ratios) // 2], "max": max(ratios)}
    machine = get_cpu_info() if options.device == "cpu" else torch.cuda.get_device_name()
    print(f"{options.student} under {options.teacher}, {options.batch} x {options.imgsz} px, {machine}")
    for name in rounds[0]:
        print(f"  {name:<12} {max(part[name] for part in rounds) / MB:10.1f} MB")
    print(f"  gid / (plain + teacher + activations) {ratio['min']:7.4f} {ratio['median']:7.4f} {ratio['max']:7.4f}")
    contents: dict[str, Any] = {"gid_over_limit": ratio, "bytes": rounds}
    if options.growth:
        contents["growth"] = early, late = growth_of(step, options.growth)
        for name in early:
            change = (late[name] - early[name]) / MB
            print(f"  {name:<12} {early[name] / MB:10.1f} MB, after {options.growth} steps {change:+.3f} MB")
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        contents["settings"] = settings | {"machine": machine, "torch": torch.__version__}
        options.json.write_text(json.dumps(contents, indent=2) + "\n")


if __name__ == "__main__":
    main()
