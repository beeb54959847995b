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


def saved_epoch(last: Path) -> int | None:
    """Epoch, from 0, that a resumed run goes on behind."""
    return load_any(last)[1]["epoch"] if last.exists() else None


def stamp(last: Path) -> tuple[int, int] | None:
    """Differs whenever the checkpoint has been replaced."""
    return (last.stat().st_ino, last.stat().st_mtime_ns) if last.exists() else None


def main() -> None:
    """Print the epoch that was saved at each kill, how the last child ended, and the files it left."""
    overrides, kills = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    weights = Path(overrides["save_dir"]) / "weights"
    last = weights / "last.pt"
    rng = random.Random(0)
    first = math.inf
    saved: list[int | None] = []  # epoch of the last checkpoint at each kill
    while True:
        epoch, written = saved_epoch(last), stamp(last)
        # However fast the machine is, the run must not end before its last kill: by kill k of n it may save epoch
        # (k + 1) (E - 2) / n of 0 ... E - 1, and one more than it began with
        most = max((len(saved) + 1) * (overrides["epochs"] - 2) // kills, -1 if epoch is None else epoch + 1)
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
        wait = first * rng.uniform(0.2, 2.2) if len(saved) < kills else math.inf
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() - begin < wait:
            time.sleep(0.005)
            if len(saved) == kills or stamp(last) == written:
                continue
            written, epoch = stamp(last), 0 if epoch is None else epoch + 1
            if math.isinf(first):
                first, wait = time.monotonic() - begin, 0.0  # what this machine takes for a start and an epoch
            elif epoch >= most:
                wait = 0.0
        if ended[0]:
            status = os.waitstatus_to_exitcode(ended[1])
            print(json.dumps({"saved": saved, "status": status, "files": sorted(p.name for p in weights.iterdir())}))
            return
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saved.append(saved_epoch(last))
        if saved[-2:-1] == saved[-1:]:  # the machine is slower than it was
            first *= 1.3


if __name__ == "__main__":
    main()
