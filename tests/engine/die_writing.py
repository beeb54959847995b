"""Train to the end though killed while files are written: `python die_writing.py OVERRIDES.json KILLS`.

The k-th child dies in the k-th file that it writes, of which half has reached the disk.
"""

import json
import os
import signal
import stat
import sys
from pathlib import Path

from kill_runs import run

import gid_yolo.files as files


def die_in(write: int, note: Path) -> None:
    """Let this process leave half of a file, note its name, and be killed."""
    fsync, written = os.fsync, 0

    def die(file: int) -> None:
        nonlocal written
        state = os.fstat(file)
        written += stat.S_ISREG(state.st_mode)
        if written == write:
            os.ftruncate(file, state.st_size // 2)
            name = Path(f"/proc/self/fd/{file}").readlink().name
            note.write_text(name.removeprefix(".").removesuffix(".part"))
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(file)

    files.os.fsync = die


def main() -> None:
    """Print the names of the files that were torn, and what the last child left."""
    overrides, kills = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    note, torn = Path(sys.argv[1]).with_name("torn"), []
    for write in range(1, kills + 2):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if write <= kills:
                    die_in(write, note)
                run(overrides)
                status = 0
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if write <= kills and status == -signal.SIGKILL:
            torn.append(note.read_text())
        elif write <= kills or status:
            sys.exit(f"child {write} ended with status {status}.")
    weights = Path(overrides["save_dir"]) / "weights"
    print(json.dumps({"torn": torn, "files": sorted(path.name for path in weights.iterdir())}))


if __name__ == "__main__":
    main()
