"""The main job on the embedded data, by the commands a user would type: `make demo`.

Trains the teacher and the plain student of the small pair side by side, then the distilled student at the plain
student's budget, exports all three to ONNX and compares them. The table at the end is `gid-benchmark`'s.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

BIN = Path(sys.executable).parent
RUNS = Path("runs") / "demo"
SIZE = 128  # pixels; the images have 160


def command(mode: str, /, **arguments: object) -> list[str]:
    """`gid-<mode> key=value ...` as a list of words."""
    return [str(BIN / f"gid-{mode}"), *(f"{key}={value}" for key, value in arguments.items())]


def start(words: list[str], log: Path) -> subprocess.Popen:
    """Start a command with its output in a file."""
    print(f"\n$ {' '.join([Path(words[0]).name, *words[1:]])}\n  (log: {log})", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "YOLO_AUTOINSTALL": "False", "YOLO_OFFLINE": "True"}
    return subprocess.Popen(words, stdout=log.open("w"), stderr=subprocess.STDOUT, env=environment)


def finish(process: subprocess.Popen, log: Path) -> None:
    """Wait for a command; on failure show the end of its log and stop."""
    if process.wait():
        print(log.read_text()[-3000:], file=sys.stderr)
        sys.exit(f"{log}: the command failed, see above.")


def main() -> None:
    """Train, export, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=9, help="epochs of both students")
    parser.add_argument("--teacher-epochs", type=int, default=9)
    options = parser.parse_args()
    began = time.time()
    runs = RUNS.resolve()
    common = {"imgsz": SIZE, "exist_ok": True, "project": runs, "plots": False, "cache": "ram"}
    student = {"model": "retina_nano", "epochs": options.epochs, "lr0": 0.002, **common}
    teacher, plain, distilled = (runs / name / "weights" / "best.pt" for name in ("teacher", "plain", "distilled"))

    print("1/3  teacher and plain student, side by side")
    logs = [RUNS / "teacher.log", RUNS / "plain.log"]
    # Nothing is downloaded here, and from random weights retina_r10 learns far sooner than retina_small
    heavy = {**student, "model": "retina_r10", "epochs": options.teacher_epochs, "name": "teacher"}
    words = command("train", **heavy)
    running = [start(words, logs[0]), start(command("train", **student, name="plain"), logs[1])]
    for process, log in zip(running, logs, strict=True):
        finish(process, log)

    print(f"\n2/3  distilled student, at the plain student's budget ({time.time() - began:.0f} s so far)")
    log = RUNS / "distilled.log"
    finish(start(command("train", **student, teacher=teacher, name="distilled"), log), log)
    text = log.read_text()
    for title in ("Preflight", "First step"):
        print("\n" + text[text.index(f"{title}") :].split("\n\n")[0])

    print(f"\n3/3  ONNX, latency and accuracy ({time.time() - began:.0f} s so far)", flush=True)
    words = command(
        "benchmark", model=distilled, baseline=plain, teacher=teacher, imgsz=SIZE, split="test",
        project=runs, name="benchmark", exist_ok=True,
    )  # fmt: skip
    subprocess.run(words, check=True)
    print(f"\n{time.time() - began:.0f} s in all")


if __name__ == "__main__":
    main()
