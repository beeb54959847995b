"""onnxruntime sessions: where they run, and how long they take."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from gid_yolo.errors import UserError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


@dataclass(frozen=True)
class Latency:
    """Milliseconds per batch, and images per second over all timed runs."""

    p50: float
    p95: float
    p99: float
    images_per_second: float


def cuda_index(device: Any) -> int | None:
    """The GPU that `device` names (`cuda`, `cuda:1`, `0`), or None for the CPU.

    Raises:
        UserError: Neither; or a GPU is asked for and this machine's onnxruntime offers none.
    """
    name = "cpu" if device is None else str(device).strip().lower()
    if name in {"", "cpu"}:
        return None
    match = re.fullmatch(r"(?:cuda:?)?(\d*)", name)
    if match is None:
        raise UserError(f"device={device} is not supported by the benchmark: give device=cpu or device=cuda.")
    import torch

    if CUDA not in onnxruntime.get_available_providers() or not torch.cuda.is_available():
        raise UserError(
            f"device={device} needs a GPU that torch and onnxruntime can use, and there is none: use device=cpu."
        )
    index = int(match.group(1) or 0)
    if index >= torch.cuda.device_count():
        raise UserError(f"device={device} does not exist: there are {torch.cuda.device_count()} GPUs, counted from 0.")
    return index


def open_session(path: str | Path, *, threads: int = 1, cuda: int | None = None) -> onnxruntime.InferenceSession:
    """Open an ONNX file with a fixed number of threads, on the CPU or on one GPU in full fp32.

    Raises:
        UserError: onnxruntime did not really start on the GPU.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3  # errors; what matters of the warnings is checked below
    providers: list[Any] = [CPU]
    if cuda is not None:
        onnxruntime.preload_dlls()  # CUDA's libraries from the wheels that torch brought
        # TF32 would round convolutions to 10 bits and fail the comparison with PyTorch's fp32
        providers.insert(0, (CUDA, {"device_id": cuda, "use_tf32": 0}))
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    if cuda is not None and CUDA not in session.get_providers():
        raise UserError(f"device=cuda: onnxruntime {onnxruntime.__version__} could not start {CUDA}: use device=cpu.")
    return session


def run(session: onnxruntime.InferenceSession, images: np.ndarray) -> np.ndarray:
    """The first output for (B, 3, H, W) images; on a GPU, copies there and back included."""
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def interleave(
    calls: Mapping[str, Callable[[np.ndarray], Any]],
    batches: Sequence[np.ndarray],
    *,
    warmup: int,
    runs: int,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time calls in turns, so that a machine that slows down or is disturbed hits all of them alike.

    Args:
        calls: What to time, by name.
        batches: Inputs, used in turn.
        warmup: Untimed runs of each before the first round. Besides, one untimed run opens every turn: the caches
            then hold the previous model's weights.
        runs: Timed runs of each in a round.
        rounds: Rounds.
        clock: Seconds.

    Returns:
        Milliseconds of each run: `rounds * runs` numbers a name.
    """
    for call in calls.values():
        for i in range(warmup):
            call(batches[i % len(batches)])
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call(batches[-1])
            for i in range(runs):
                start = clock()
                call(batches[i % len(batches)])
                times[name].append((clock() - start) * 1e3)
    return times


def latency(times: Sequence[float], batch: int) -> Latency:
    """Percentiles (linear between neighbours) of milliseconds per batch."""
    p50, p95, p99 = (float(p) for p in np.percentile(times, [50, 95, 99]))
    return Latency(p50, p95, p99, batch * len(times) * 1e3 / float(np.sum(times)))


def measure(
    sessions: Mapping[str, onnxruntime.InferenceSession],
    batches: Sequence[np.ndarray],
    *,
    warmup: int,
    runs: int,
    rounds: int,
) -> dict[str, Latency]:
    """Latency of each session on real images."""
    calls = {name: partial(run, session) for name, session in sessions.items()}
    times = interleave(calls, batches, warmup=warmup, runs=runs, rounds=rounds)
    return {name: latency(values, batches[0].shape[0]) for name, values in times.items()}
