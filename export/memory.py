"""Peak memory of a file's network, in a process of its own (`python -m gid_yolo.export.memory`)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gid_yolo.export.providers import run, start

RUNS = 3


def peak_memory(path: Path, provider: str, threads: int, shape: Sequence[int]) -> float | None:
    """MB (1e6 bytes) that opening the file and running it adds to the peak of a process; None where nothing tells.

    Of the host's memory: what a GPU's provider takes there, without the GPU's own.

    Args:
        path: The file.
        provider: As for `providers.start`.
        threads: Of the operators.
        shape: Of the input, (B, 3, H, W).
    """
    command = [sys.executable, "-m", "gid_yolo.export.memory", str(path), provider, str(threads), *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return float(done.stdout.split()[-1])
    except (IndexError, ValueError):
        return None


def _peak() -> int:
    """Peak of this process in bytes; Linux alone lets a process read it."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def main() -> None:
    """Print the number; nothing where there is none."""
    path, provider, threads, *shape = sys.argv[1:]
    try:
        before = _peak()
    except OSError:
        return
    session = start(path, provider, int(threads))
    kind = np.float16 if "16" in session.get_inputs()[0].type else np.float32
    images = np.random.default_rng(0).random([int(side) for side in shape], np.float32).astype(kind)
    for _ in range(RUNS):
        run(session, images)
    print((_peak() - before) / 1e6)


if __name__ == "__main__":
    main()
