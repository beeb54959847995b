"""Compare a distilled model with its plain twin and its teacher, as the ONNX files that would be deployed."""

from __future__ import annotations

import difflib
import inspect
import platform
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import torch
import ultralytics
from ultralytics.cfg import get_save_dir
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import get_cpu_info, get_flops, get_gpu_info

from gid_yolo._version import __version__
from gid_yolo.engine.checkpoint import fingerprint, load_model, record_of
from gid_yolo.engine.classes import fit_classes
from gid_yolo.engine.config import thresholds
from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.errors import UserError
from gid_yolo.export.budget import budget_notes, comparable, distilled
from gid_yolo.export.chart import write_png
from gid_yolo.export.evaluate import image_sizes, open_split, read_data
from gid_yolo.export.gains import noise_note
from gid_yolo.export.matrix import Settings, make_cells, make_examples, measure_times
from gid_yolo.export.page import write_html
from gid_yolo.export.parity import (
    AP_LIMIT,
    BOX_LIMIT,
    SCORE_LIMIT,
    Contender,
)
from gid_yolo.export.report import BenchmarkReport, conditions, write_csv, write_json, write_markdown
from gid_yolo.export.rows import Row
from gid_yolo.export.session import CPU, CUDA, cuda_index

NO_COMPARISON = "WARNING: so this is NO COMPARISON of model and baseline; unequal=True calls it one all the same."


def benchmark(
    model: str | Path,
    *,
    baseline: str | Path | None = None,
    teacher: str | Path | None = None,
    data: Any = None,
    imgsz: Any = None,
    batch: int | Sequence[int] = 1,
    precision: str | Sequence[str] = "fp32",
    max_ap_drop: float = 1.0,
    split: str = "val",
    warmup: int = 10,
    runs: int = 50,
    rounds: int = 5,
    threads: int = 1,
    parity_images: int = 20,
    device: Any = None,
    unequal: bool = False,
    project: str | None = None,
    name: str | None = None,
    exist_ok: bool = False,
    **unknown: Any,
) -> BenchmarkReport:
    """Export, prove equal to PyTorch, time and score up to three checkpoints, in onnxruntime.

    Args:
        model: Checkpoint of the distilled model.
        baseline: Checkpoint of the same model trained without a teacher.
        teacher: Checkpoint of the teacher.
        data: Data set; the embedded one where None.
        imgsz: Side, or height and width, of the exported inputs, or a list of such pairs; by default what `model` was
            trained with.
        batch: Images per run of the network, one number or several.
        precision: `fp32`, and with it `fp16` and `int8`, e.g. `fp32,int8`; INT8's ranges are found on training images.
        max_ap_drop: Points of mAP that a lower precision may lose; a file that loses more has failed.
        split: Part of the data to score on.
        warmup: Untimed runs of each model before the first round.
        runs: Timed runs of each model in a round.
        rounds: Turns that the models take.
        threads: Threads of onnxruntime's operators.
        parity_images: Real images on which ONNX must equal PyTorch.
        device: `cpu`, or `cuda` (`cuda:1`, `0`) for onnxruntime's CUDA provider.
        unequal: Call it a comparison even where `model` and `baseline` were trained on other data, for other epochs, at
            another size or from other weights; else no gain is given then.
        project: Folder of the run; by default Ultralytics' runs folder.
        name: Name of the run, `benchmark` by default.
        exist_ok: Write into an existing run.
        **unknown: Anything else is refused.

    Returns:
        The rows, also printed and written as `benchmark.json`, `.csv`, `.md`, `.png` and `.html`.

    Raises:
        UserError: Arguments, checkpoints or data that cannot be compared.
    """
    _refuse(unknown)
    if not isinstance(unequal, bool):
        raise UserError(f"unequal={unequal} must be True or False.")
    counts = {"runs": runs, "rounds": rounds, "threads": threads, "parity_images": parity_images}
    batches = _several(batch)
    _check_counts([("batch", number) for number in batches] + list(counts.items()), warmup)
    precisions = _precisions(precision)
    if isinstance(max_ap_drop, bool) or not isinstance(max_ap_drop, int | float) or max_ap_drop < 0:
        raise UserError(f"max_ap_drop={max_ap_drop} must be a number of at least 0, in points of mAP.")
    cuda = cuda_index(device)
    networks = [
        Contender(role, Path(path), network := load_model(path, role)[0], fingerprint(network))
        for role, path in (("model", model), ("baseline", baseline), ("teacher", teacher))
        if path is not None
    ]
    records = {contender.role: record_of(contender.model) for contender in networks}
    fair = comparable(records["model"], records["baseline"]) if "baseline" in records else None
    if fair is False and not unequal:
        LOGGER.warning(" ".join([*budget_notes(records["model"], records["baseline"]), NO_COMPARISON]))
    stride = max(int(contender.model.stride.max()) for contender in networks)
    sizes = image_sizes(networks[0].model.args.get("imgsz", 640) if imgsz is None else imgsz, stride)
    data_path, contents = read_data(data, split)
    for c in networks:
        c.model = fit_classes(c.model, contents["names"], f"{c.role}={c.path}", data_path)
    loaders = {
        tuple(size): open_split(data_path, contents, split=split, imgsz=size, batch=batches[0]) for size in sizes
    }
    save_dir = get_save_dir(
        SimpleNamespace(project=project, name=name, task="detect", mode="benchmark", exist_ok=exist_ok, save_dir=None)
    )
    save_dir.mkdir(parents=True, exist_ok=True)

    evaluation = {"data": data_path, "split": split, "save_dir": save_dir}
    settings = Settings(sizes, batches, precisions, parity_images, threads, cuda, max_ap_drop)
    cells = make_cells(networks, settings, loaders, evaluation)
    passed = [cell for cell in cells if cell.failed is None]
    times = {"images": parity_images, "warmup": warmup, "runs": runs, "rounds": rounds}
    measure_times(passed, loaders, **times, threads=threads, cuda=cuda)

    arguments = {
        **counts,
        **{"batch": batches, "precision": precisions, "max_ap_drop": max_ap_drop, "warmup": warmup},
        **{"imgsz": sizes[0] if len(sizes) == 1 else sizes, "split": split, "data": str(data_path), "device": device},
    }
    provider = CPU if cuda is None else CUDA
    rows = tuple(_row(cell, provider) for cell in cells)
    shown = [(_label(c), c) for c in passed if (c.precision, c.batch, c.size) == ("fp32", 1, sizes[0])]
    loader = loaders[tuple(sizes[0])]
    report = BenchmarkReport(
        rows=rows,
        settings=_settings(networks, rows, arguments, len(loader.dataset), cuda),
        notes=(*_notes(cells, rows), *([NO_COMPARISON] if fair is False and not unequal else [])),
        save_dir=save_dir,
        examples=make_examples(shown, loader.dataset, contents["names"]),
        comparable=None if unequal and not fair else fair,
    )
    writers = {"json": write_json, "csv": write_csv, "md": write_markdown, "png": write_png, "html": write_html}
    for suffix, write in writers.items():
        write(report, save_dir / f"benchmark.{suffix}")
    LOGGER.info(f"\n{report}\n\nReport: {save_dir}/benchmark.html, .json, .csv, .md, .png")
    return report


def _refuse(unknown: dict[str, Any]) -> None:
    known = [p.name for p in inspect.signature(benchmark).parameters.values() if p.kind is not p.VAR_KEYWORD]
    for key in unknown:
        close = difflib.get_close_matches(key, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(known)}."
        raise UserError(f"'{key}' is not an argument of the benchmark: {hint}")


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _precisions(precision: Any) -> list[str]:
    words = precision.split(",") if isinstance(precision, str) else _several(precision)
    found = list(dict.fromkeys(str(word).strip().lower() for word in words))
    if not found or set(found) - {"fp32", "fp16", "int8"} or "fp32" not in found:
        raise UserError(
            f"precision={precision} must be fp32 with or without fp16 and int8, which are measured against it, e.g. "
            "precision=fp32,int8."
        )
    return sorted(found, key=["fp32", "fp16", "int8"].index)


def _check_counts(counts: Sequence[tuple[str, Any]], warmup: Any) -> None:
    for key, value in [*counts, ("warmup", warmup)]:
        least = 0 if key == "warmup" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{key}={value} must be a whole number of at least {least}.")


def _row(contender: Contender, provider: str) -> Row:
    fused = deepcopy(contender.model).fuse(verbose=False)
    return Row(
        role=contender.role,
        label=_label(contender),
        name=Path(contender.model.yaml.get("yaml_file") or "custom").stem,
        backbone=str(contender.model.yaml["backbone"] if isinstance(contender.model, GIDDetectionModel) else "its own"),
        precision=contender.precision,
        provider=provider,
        batch=contender.batch,
        height=contender.size[0],
        width=contender.size[1],
        parameters=sum(p.numel() for p in fused.parameters()) / 1e6,
        gflops=float(get_flops(fused, list(contender.size))) or None,  # it counts 0 where it cannot count
        file_size=contender.onnx.stat().st_size / 1e6,
        **({} if contender.latency is None else asdict(contender.latency)),
        preprocess=contender.preprocess,
        postprocess=contender.postprocess,
        memory=contender.memory,
        columns=contender.columns,
        box_difference=contender.boxes,
        score_difference=contender.scores,
        ap_difference=contender.ap,
        ap_drop=contender.drop,
        failed=contender.failed,
        compared=contender.compared,
    )


def _label(contender: Contender) -> str:
    if contender.role == "model":
        return "distilled" if distilled(record_of(contender.model)) else "model"
    return {"baseline": "plain", "teacher": "teacher"}[contender.role]


def _named(cell: Contender, rows: Sequence[Row]) -> str:
    """The label, and the setting where there are several."""
    settings = {row.setting for row in rows}
    where = f" {cell.precision}, batch {cell.batch}, {cell.size[0]}x{cell.size[1]}" if len(settings) > 1 else ""
    return _label(cell) + where


def _notes(contenders: list[Contender], rows: Sequence[Row]) -> list[str]:
    notes = [f"WARNING: FAILED, and so without results: {_named(c, rows)} ({c.failed})" for c in contenders if c.failed]
    notes += [
        f"WARNING: NOT COMPARED with PyTorch: {_label(c)} detects nothing on the images of the comparison."
        for c in contenders
        if not c.compared
    ]
    if noise := noise_note(rows):
        notes.append(noise)
    records = {contender.role: record_of(contender.model) for contender in contenders}
    return notes + (budget_notes(records["model"], records["baseline"]) if "baseline" in records else [])


def _settings(
    contenders: list[Contender], rows: Sequence[Row], arguments: dict[str, Any], images: int, cuda: int | None
) -> dict[str, Any]:
    machine = get_cpu_info() if cuda is None else f"{get_gpu_info(cuda)}, {get_cpu_info()}"
    threads = arguments["threads"]
    summary = (
        f"{conditions(rows)}, {threads} thread{'s' * (threads > 1)}, "
        f"{machine}; median of {arguments['rounds']} x {arguments['runs']} runs; "
        f"AP on {images} images of {arguments['split']}"
    )
    return {
        "summary": summary,
        "arguments": {**arguments, "thresholds": {c.role: thresholds(c.model.yaml) for c in contenders}},
        "limits": {"boxes": BOX_LIMIT, "scores": SCORE_LIMIT, "ap": AP_LIMIT, "ap_drop": arguments["max_ap_drop"]},
        "images": images,
        "versions": {
            "gid_yolo": __version__,
            "ultralytics": ultralytics.__version__,
            "torch": torch.__version__,
            "onnxruntime": onnxruntime.__version__,
            "python": platform.python_version(),
        },
        "provider": CPU if cuda is None else CUDA,
        "cpu": get_cpu_info(),
        "gpu": None if cuda is None else get_gpu_info(cuda),
        "threads": threads,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "checkpoints": {
            c.role: {"path": str(c.path), "fingerprint": c.fingerprint, "record": record_of(c.model)}
            for c in contenders
        },
    }
