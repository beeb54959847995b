"""The command line: `gid <mode> key=value ...`, and one command a mode (`gid-train`, `gid-val`, ...)."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gid_yolo._version import __version__
from gid_yolo.cfg import CFG_DIR, model_names, recipe_names, study_names
from gid_yolo.errors import UserError

# The disk is full, or one may not write there. Other errors of the system keep their traceback
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR}
_CLOSED |= {errno.ENOENT, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP}
# Parameters of the methods behind the commands, which take what no word can be: an object, or a loop to yield to
_IN_PYTHON = ("self", "trainer", "validator", "predictor", "stream", "embed")
MODES = ("train", "val", "predict", "export", "benchmark", "visualize", "study")

HELP = f"""gid-yolo {__version__}: small detectors, distilled and deployed

  gid-train      model=retina_nano [teacher=retina_small] [data=my.yaml] [epochs=40] [imgsz=320] [recipe=...] ...
  gid-val        model=runs/.../best.pt [data=my.yaml] [split=test]
  gid-predict    model=runs/.../best.pt source=images/
  gid-export     model=runs/.../best.pt [imgsz=320]
  gid-benchmark  model=distilled.pt baseline=plain.pt teacher=teacher.pt data=my.yaml
  gid-visualize  model=student.pt teacher=teacher.pt source=images/
  gid-study      table6 model=retina_nano teacher=retina_small.pt data=my.yaml [seeds=3] [epochs=40] ...
                 [split=test] [device=0,1] [jobs=2] [project=folder] [longer=1.5] [plan=True]

`gid train ...` is the same as `gid-train ...`. Without data= a checkpoint's own is used, by
gid-study and for a new model the embedded one. Checkpoints are read as data; trust=True opens those that could run
code.
Studies: {", ".join(study_names())} (does it help on my data?), or a yaml of your own.
Models: {", ".join(model_names())}; or a yaml of your own, with backbone=<any timm name>.
Recipes: {", ".join(recipe_names())}; or a yaml of your own.
gid-benchmark has arguments of its own, with these defaults:
  split=val imgsz=...          part of the data, and size of the images (the one that model= was trained with)
  precision=fp32 batch=1       also fp32,fp16,int8 and [1,8]: one file for each
  provider=cpu device=cpu      one of both: cpu, cuda, cuda:1, tensorrt, openvino, ..., or some: cpu,openvino
  others=...                   more files to measure, .pt and .onnx, e.g. a.onnx,b.pt
  warmup=10 runs=50 rounds=5   untimed runs, then timed runs in each of so many turns
  threads=1 parity_images=20   of onnxruntime's operators; images on which ONNX must equal PyTorch
  max_ap_drop=1.0              points of mAP that fp16 and int8 may lose
  unequal=False                compare models that were trained unequally
  project=... name=... exist_ok=False
Arguments of the others are Ultralytics' (https://docs.ultralytics.com/usage/cfg) and these:
"""


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """Turn `key=value` words into arguments, with Ultralytics' reading of values (None, True, 1e-3, [0, 1], ...).

    Raises:
        UserError: A word that is not `key=value`.
    """
    from ultralytics.cfg import merge_equals_args, parse_key_value_pair

    parsed: dict[str, Any] = {}
    try:
        words = merge_equals_args(list(arguments))
    except SyntaxError as error:
        raise UserError(str(error)) from error
    except IndexError as error:  # an = that has nothing to join
        raise UserError("an '=' stands alone: write key=value, e.g. model=retina_nano.") from error
    for word in words:
        word = word.lstrip("-").rstrip(",")
        if word in {"resume", "exist_ok"}:
            parsed[word] = True
            continue
        key, sign, value = word.partition("=")
        if not key or not sign or not value.strip():
            raise UserError(f"'{word}' is not an argument: write key=value, e.g. model=retina_nano.")
        key, parsed_value = parse_key_value_pair(word)
        parsed[key] = parsed_value
    return parsed


def run(mode: str, arguments: dict[str, Any]) -> Any:
    """Run a mode with parsed arguments.

    Raises:
        UserError: What the arguments ask for cannot be done.
    """
    if python := [word for word in _IN_PYTHON if word in arguments]:
        raise UserError(f"{python[0]}= is not an argument of a command, but of GID in Python: leave it out.")
    if mode == "study":
        from gid_yolo.analysis.study import study

        return study(**arguments)

    from gid_yolo.engine.recipe import read_cfg
    from gid_yolo.model import GID  # imports torch and Ultralytics

    model, trust = arguments.pop("model", None), arguments.pop("trust", False)
    if not isinstance(trust, bool):
        raise UserError(f"trust={trust} must be True or False.")
    if mode == "train" and arguments.get("resume"):
        if arguments["resume"] is True:
            if model is None:
                raise UserError("resume=True needs the run to go on with: add model=runs/.../weights/last.pt.")
            arguments["resume"] = str(model)
        elif model is not None and Path(str(model)).resolve() != Path(str(arguments["resume"])).resolve():
            raise UserError(f"resume={arguments['resume']} and model={model} name two runs to go on with: give one.")
        model = arguments["resume"]
        if Path(str(model)).is_dir():
            raise UserError(f"model={model} is a folder: give the weights/last.pt of the run.")
    for key in ("cfg", "recipe"):
        if mode != "train" and arguments.get(key):
            raise UserError(f"{key}={arguments[key]} is for gid-train: give gid-{mode} its arguments one by one.")
    if model is None and arguments.get("cfg"):
        model = read_cfg(arguments["cfg"]).get("model")
    if model is None:
        if mode != "train":
            raise UserError(f"model= is missing: gid-{mode} needs a checkpoint, e.g. model=runs/.../weights/best.pt.")
        model = "retina_nano"
    if mode in {"predict", "visualize"} and arguments.get("source") is None:
        raise UserError("source= is missing: give an image or a folder.")
    if mode == "visualize" and arguments.get("teacher") is None:
        raise UserError("teacher= is missing: general instances are where student and teacher differ.")
    loaded = GID(model, trust=trust)
    if mode in {"val", "predict", "export", "visualize"} and loaded.ckpt_path is None:
        raise UserError(f"model={model} is untrained: gid-{mode} needs a checkpoint, e.g. runs/.../weights/best.pt.")
    if mode == "predict":  # as `yolo predict`: results go to a folder, and a video does not pile up in memory
        for _ in loaded.predict(**{"save": True, **arguments}, stream=True):
            pass
        return None
    return getattr(loaded, mode)(**arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """`gid <mode> key=value ...`; the exit status is 2 after a mistake that one sentence explains."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in {"help", "-h", "--help"} or (len(words) > 1 and words[1] in {"help", "-h", "--help"}):
        print(HELP + _own_arguments())
        return 0
    if words[0] in {"version", "--version", "-V"}:
        print(__version__)
        return 0
    os.environ.setdefault("YOLO_AUTOINSTALL", "False")  # what is needed is declared; install nothing at run time
    mode, *rest = words
    try:
        if mode not in MODES:
            raise UserError(f"'{mode}' is not a mode: choose from {', '.join(MODES)}.")
        run(mode, _study_arguments(rest) if mode == "study" else parse(rest))
    except UserError as error:
        print(f"gid {mode}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in _FULL | _CLOSED:
            raise
        advice = "make room" if error.errno in _FULL else "give another place"
        print(f"gid {mode}: {error.filename or 'a file'} cannot be used ({error.strerror}): {advice}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        left = "the same command goes on" if mode == "study" else "; ".join(map(str, error.args))
        print(f"gid {mode}: stopped{left and f'; {left}'}.", file=sys.stderr)
        return 130
    return 0


def _study_arguments(words: list[str]) -> dict[str, Any]:
    """Those of `gid-study`, whose first word says which study."""
    if not words or "=" in words[0]:
        raise UserError(f"say which study, e.g. gid-study verdict: {', '.join(study_names())}, or a yaml of your own.")
    parsed = parse(words[1:])
    if "name" in parsed:  # the study's would be lost
        raise UserError("name= is what gid-study sets for each run: leave it out.")
    return {"name": words[0], **parsed}


def _own_arguments() -> str:
    """The commented lines of `cfg/default.yaml` that are ours, as they stand there."""
    from gid_yolo.engine.config import OWN_KEYS

    lines = (CFG_DIR / "default.yaml").read_text(encoding="utf-8").splitlines()
    return "\n".join(f"  {line}" for line in lines if line.split(":")[0] in OWN_KEYS)


def train() -> int:
    """`gid-train`."""
    return main(["train", *sys.argv[1:]])


def val() -> int:
    """`gid-val`."""
    return main(["val", *sys.argv[1:]])


def predict() -> int:
    """`gid-predict`."""
    return main(["predict", *sys.argv[1:]])


def export() -> int:
    """`gid-export`."""
    return main(["export", *sys.argv[1:]])


def benchmark() -> int:
    """`gid-benchmark`."""
    return main(["benchmark", *sys.argv[1:]])


def visualize() -> int:
    """`gid-visualize`."""
    return main(["visualize", *sys.argv[1:]])


def study() -> int:
    """`gid-study`."""
    return main(["study", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
