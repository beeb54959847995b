"""onnxruntime sessions on the provider that was asked for, or an error: never quietly on another."""

from __future__ import annotations

import ctypes
import os
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from gid_yolo.errors import UserError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
TENSORRT, OPENVINO = "TensorrtExecutionProvider", "OpenVINOExecutionProvider"
PROVIDERS = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT, "openvino": OPENVINO}
# What provider=None tries. TensorRT builds an engine for minutes, so that it runs only where it is asked for
AUTOMATIC = ("cuda", "openvino", "cpu")
_PACKAGES = {"cuda": "onnxruntime-gpu", "tensorrt": "onnxruntime-gpu", "openvino": "onnxruntime-openvino"}


def open_session(path: str | Path) -> onnxruntime.InferenceSession:
    """Open an ONNX file on one thread of the CPU: what everybody can run, and what does not vary.

    Raises:
        UserError: A file that cannot be opened.
    """
    return start(path, "cpu", 1)


def start(path: str | Path, provider: str | None = None, threads: int | None = None) -> onnxruntime.InferenceSession:
    """Open an ONNX file on a provider; `session.get_providers()[0]` is then that one.

    Single operators that a GPU's provider lacks run on the CPU all the same: onnxruntime decides so per node.

    Args:
        path: The file.
        provider: `cpu`, `cuda`, `cuda:1`, `tensorrt`, `tensorrt:1`, `openvino` (its CPU device), `openvino:gpu` or
            `openvino:npu`; the first of `AUTOMATIC` that starts where None.
        threads: Threads of the operators on the CPU; onnxruntime's choice (a thread a core) where None.

    Raises:
        UserError: A file that cannot be opened, more threads than cores, or the provider is unknown, absent or does not
            start.
    """
    if threads is not None:
        check_threads(threads)
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist." if not Path(path).exists() else f"{path} is not a file.")
    if provider is not None:
        return _start(path, provider, threads)
    for name in AUTOMATIC:
        if PROVIDERS[name] not in onnxruntime.get_available_providers() or (name == "cuda" and not gpu_count()):
            continue
        try:
            return _start(path, name, threads)
        except ProviderError as error:
            warnings.warn(str(error), stacklevel=3)
    raise UserError(f"onnxruntime {onnxruntime.__version__} has none of {', '.join(PROVIDERS[n] for n in AUTOMATIC)}.")


class ProviderError(UserError):
    """The provider does not start; the file is not to blame."""


def _start(path: str | Path, provider: str, threads: int | None) -> onnxruntime.InferenceSession:
    name, entries = _entries(provider, threads)
    wanted = check_provider(provider)
    if name in {"cuda", "tensorrt"} and hasattr(onnxruntime, "preload_dlls"):  # since 1.21
        onnxruntime.preload_dlls()  # CUDA's libraries from NVIDIA's wheels, if they are installed
    try:
        session = _session(path, entries, threads)
    except Exception as error:  # onnxruntime's exceptions have no common base below Exception
        if name != "cpu":
            _start(path, "cpu", threads)  # raises if it is the file
            raise ProviderError(f"provider={provider}: {wanted} does not start: {first_line(error)}") from error
        raise UserError(
            f"{path} is not an ONNX file that onnxruntime {onnxruntime.__version__} can open: {first_line(error)}"
        ) from error
    if session.get_providers()[0] != wanted:  # it says why on stderr, and goes on without
        raise ProviderError(
            f"provider={provider}: onnxruntime {onnxruntime.__version__} could not start {wanted} and would run on "
            f"{session.get_providers()[0]}; its own lines above name what is missing."
        )
    return session


def check_provider(provider: str) -> str:
    """The name, to onnxruntime, of a provider that this machine seems to have; `start` proves it.

    Raises:
        UserError: The provider is unknown, onnxruntime is here without it, or there is no such GPU.
    """
    name, entries = _entries(provider, None)
    wanted, has = PROVIDERS[name], onnxruntime.get_available_providers()
    if wanted not in has:
        raise ProviderError(
            f"provider={provider}: onnxruntime {onnxruntime.__version__} is here without {wanted} (it has "
            f"{', '.join(has)}): pip install {_PACKAGES.get(name, 'onnxruntime')}, and uninstall its other builds."
        )
    if name in {"cuda", "tensorrt"}:
        count, index = gpu_count(), entries[0][1]["device_id"]
        if not count:
            raise ProviderError(f"provider={provider} needs a GPU of NVIDIA with its driver, and there is none.")
        if index >= count:
            raise ProviderError(f"provider={provider} does not exist: there are {count} GPUs, counted from 0.")
    return wanted


def _entries(provider: str, threads: int | None) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """Our name of the provider, and onnxruntime's list of providers with their options."""
    match = re.fullmatch(r"(cpu)|(cuda|tensorrt)(?::(\d+))?|(openvino)(?::(cpu|gpu|npu))?", str(provider).lower())
    if match is None:
        raise UserError(
            f"provider={provider} is not known: cpu, cuda, tensorrt (also cuda:1, tensorrt:1), openvino (also "
            "openvino:gpu, openvino:npu), or None for the best that starts."
        )
    cpu, nvidia, index, openvino, device = match.groups()
    name = cpu or nvidia or openvino
    entries: list[tuple[str, dict[str, Any]]] = [(CPU, {})]
    if nvidia:
        # TF32 would round convolutions to 10 bits, and fail a comparison with PyTorch's fp32
        entries.insert(0, (CUDA, {"device_id": int(index or 0), "use_tf32": 0}))
        if nvidia == "tensorrt":  # CUDA stays behind it, for the operators that TensorRT lacks
            entries.insert(0, (TENSORRT, {"device_id": int(index or 0)}))
    elif openvino:
        options: dict[str, Any] = {"device_type": (device or "cpu").upper()}
        if options["device_type"] == "CPU":
            options |= {"precision": "FP32"} | ({} if threads is None else {"num_of_threads": str(threads)})
        entries.insert(0, (OPENVINO, options))
    return name, entries


def _session(path: str | Path, entries: list[Any], threads: int | None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0  # 0 is its choice
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3  # errors
    # Without enable_fallback=0 a provider that fails is replaced, at the start and in every later run
    return onnxruntime.InferenceSession(str(path), options, providers=entries, enable_fallback=0)


def run(session: onnxruntime.InferenceSession, images: np.ndarray) -> np.ndarray:
    """The first output for (B, 3, H, W) images; on a GPU, copies there and back included."""
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def check_threads(threads: Any) -> None:
    """Refuse what is not a whole number from 1 to the cores that this process may run on.

    Raises:
        UserError: It is not.
    """
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise UserError(f"threads={threads} must be a whole number of at least 1.")
    if threads > (cores := core_count()):
        raise UserError(f"threads={threads} must be at most {cores}, the cores of this machine.")


def core_count() -> int:
    """Cores that this process may run on, where the system says so; else those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_count() -> int:
    """NVIDIA GPUs that the driver shows to this process (`CUDA_VISIBLE_DEVICES` counts); 0 without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return 0 if failed else count.value


def first_line(error: BaseException) -> str:
    """The first line of what onnxruntime says, without its codes."""
    text = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text[0])[:300].rstrip(".") + "."
