"""Train to the end though killed: `python kill_runs.py OVERRIDES.json KILLS` forks a run, kills it, resumes it, ...

Forking, so that PyTorch is imported once; every child is a process of its own, which SIGKILL ends like any other.
"""

import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

from gid_yolo.engine.checkpoint import load_any
from gid_yolo.engine.trainer import GIDTrainer


def run(overrides: dict) -> None:
    """In a child: train, or go on where the last child was killed."""
    last = Path(overrides["save_dir"]) / "weights" / "last.pt"
    if last.exists():
        load_any(last)  # whatever was killed, this file is whole
        overrides = {"model": str(last), "resume": str(last)}
    GIDTrainer(overrides=overrides).train()


def main() -> None:
    """Print the epoch that was saved at each kill, how the last child ended, and the files it left."""
    overrides, kills = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    weights = Path(overrides["save_dir"]) / "weights"
    rng = random.Random(0)
    first = math.inf
    saved: list[int | None] = []  # epoch of the last checkpoint at each kill
    while True:
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)  # its workers go with it
            status = 1
            try:
                run(overrides)
                status = 0
            finally:
                os._exit(status)
        begin = time.monotonic()
        wait = first * rng.uniform(0.2, 2.2) if len(saved) < kills else float("inf")
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() - begin < wait:
            time.sleep(0.005)
            if math.isinf(first) and (weights / "last.pt").exists():
                first = time.monotonic() - begin  # what this machine takes for a start and an epoch
                wait = 0.0
        if ended[0]:
            status = os.waitstatus_to_exitcode(ended[1])
            print(json.dumps({"saved": saved, "status": status, "files": sorted(p.name for p in weights.iterdir())}))
            return
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saved.append(load_any(weights / "last.pt")[1]["epoch"] if (weights / "last.pt").exists() else None)


if __name__ == "__main__":
    main()
