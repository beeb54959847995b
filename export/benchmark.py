"""Compare a distilled model with its plain twin and its teacher, as the ONNX files that would be deployed."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import torch
import ultralytics
from ultralytics.cfg import get_save_dir
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import get_cpu_info, get_gpu_info

from gid_yolo._version import __version__
from gid_yolo.engine.values import check_texts
from gid_yolo.export.arguments import check_counts, check_drop, check_switches, precisions, providers, refuse, several
from gid_yolo.export.arguments import others as other_files
from gid_yolo.export.budget import budget_notes, comparable
from gid_yolo.export.chart import write_png
from gid_yolo.export.contenders import Contender, fit_to, load_contenders
from gid_yolo.export.evaluate import image_sizes, open_split, read_data
from gid_yolo.export.example_images import make_examples
from gid_yolo.export.gains import noise_note
from gid_yolo.export.intervals import few_images_notes, rows_of
from gid_yolo.export.matrix import Matrix, Settings
from gid_yolo.export.measure_times import measure_times
from gid_yolo.export.page import write_html
from gid_yolo.export.parity import AP_LIMIT, BOX_LIMIT, SCORE_LIMIT
from gid_yolo.export.report import BenchmarkReport, conditions, write_csv, write_json, write_markdown
from gid_yolo.export.rows import Row

MANY = 100  # runs of which one is over p99
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
    provider: str | Sequence[str] | None = None,
    device: Any = None,
    others: Any = None,
    unequal: bool = False,
    trust: bool = False,
    project: str | None = None,
    name: str | None = None,
    exist_ok: bool = False,
    **unknown: Any,
) -> BenchmarkReport:
    """Export, prove equal to PyTorch, time and score checkpoints, and ONNX files beside them, in onnxruntime.

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
        provider: What onnxruntime runs on, one or several: `cpu`, `cuda`, `cuda:1`, `tensorrt`, `openvino`, ...: see
            `providers.start`; e.g. `cpu,openvino`. The CPU by default.
        device: `cpu`, or `cuda` (`cuda:1`, `0`): Ultralytics' word for one provider.
        others: More files to measure, `.pt` and `.onnx`, e.g. `a.onnx,b.pt`. An ONNX file runs as it is, in its own
            batch and size where they are fixed; there is no checkpoint to compare it with.
        unequal: Call it a comparison even where `model` and `baseline` were trained on other data, for other epochs, at
            another size or from other weights; else no gain is given then.
        trust: Open checkpoints that are not plain data, which lets them run code.
        project: Folder of the run; by default Ultralytics' runs folder.
        name: Name of the run, `benchmark` by default.
        exist_ok: Write into an existing run.
        **unknown: Anything else is refused.

    Returns:
        The rows, also printed and written as `benchmark.json`, `.csv`, `.md`, `.png` and `.html`.

    Raises:
        UserError: Arguments, checkpoints or data that cannot be compared.
    """
    refuse(unknown, [p.name for p in inspect.signature(benchmark).parameters.values() if p.kind is not p.VAR_KEYWORD])
    texts = {"baseline": baseline, "teacher": teacher, "data": data, "project": project, "name": name}
    check_texts(texts, ("baseline",))
    check_switches({"unequal": unequal, "trust": trust, "exist_ok": exist_ok})
    counts = {"runs": runs, "rounds": rounds, "threads": threads, "parity_images": parity_images}
    batches = list(dict.fromkeys(several(batch)))
    check_counts([("batch", number) for number in batches] + list(counts.items()), warmup)
    check_drop(max_ap_drop)
    chosen: dict[str, Any] = {"precisions": precisions(precision), "providers": providers(provider, device)}
    files = other_files(others)
    contenders = load_contenders({"model": model, "baseline": baseline, "teacher": teacher}, files, trust)
    fair = _fair(contenders, unequal)
    trained = getattr(contenders[0].model, "args", {}).get("imgsz", 640)
    sizes = image_sizes(trained if imgsz is None else imgsz, max(c.stride for c in contenders))
    data_path, contents = read_data(data, split, trust)
    for contender in contenders:
        fit_to(contender, contents["names"], data_path)
    wanted = {tuple(size) for c in contenders for size, _ in c.places(sizes, batches)}
    loaders = {size: open_split(data_path, contents, split=split, imgsz=size, batch=batches[0]) for size in wanted}
    save_dir = get_save_dir(
        SimpleNamespace(project=project, name=name, task="detect", mode="benchmark", exist_ok=exist_ok, save_dir=None)
    )
    save_dir.mkdir(parents=True, exist_ok=True)

    limits: dict[str, Any] = {"images": parity_images, "threads": threads, "max_ap_drop": max_ap_drop}
    settings = Settings(sizes, batches, **chosen, **limits, trust=trust)
    cells = Matrix(settings, loaders, data_path, split, save_dir).cells(contenders)
    passed = [cell for cell in cells if cell.failed is None]
    times = {"images": parity_images, "warmup": warmup, "runs": runs, "rounds": rounds}
    measure_times(passed, loaders, **times, threads=threads)

    size = sizes[0] if len(sizes) == 1 else sizes
    arguments = {
        **counts, "batch": batches, "precision": chosen["precisions"], "provider": chosen["providers"],
        "max_ap_drop": max_ap_drop, "warmup": warmup, "split": split, "data": str(data_path), "imgsz": size,
        "others": [str(path) for path in files],
    }  # fmt: skip
    rows = rows_of(cells, compared=bool(fair) or (unequal and baseline is not None))
    shown = list({c.label: c for c in reversed(passed) if c.failed is None}.values())[::-1]  # the first file of each
    dataset = loaders[tuple(sizes[0])].dataset
    report = BenchmarkReport(
        rows=rows,
        settings=_settings(contenders, rows, arguments, len(dataset), settings.device),
        notes=(*_notes(cells, rows, rounds * runs), *([NO_COMPARISON] if fair is False and not unequal else [])),
        save_dir=save_dir,
        examples=make_examples(shown, dataset, contents["names"]),
        comparable=None if unequal and not fair else fair,
    )
    _write(report, save_dir)
    return report


def _fair(contenders: Sequence[Contender], unequal: bool) -> bool | None:
    """Whether model and baseline were trained alike; None without a baseline."""
    records = {c.role: c.record for c in contenders}
    if "baseline" not in records:
        return None
    fair = comparable(records["model"], records["baseline"])
    if fair is False and not unequal:
        notes = [*budget_notes(records["model"], records["baseline"]), NO_COMPARISON]
        LOGGER.warning(" ".join(note.removeprefix("WARNING: ") for note in notes))  # which the log says itself
    return fair


def _write(report: BenchmarkReport, folder: Path) -> None:
    writers = {"json": write_json, "csv": write_csv, "md": write_markdown, "png": write_png, "html": write_html}
    for suffix, write in writers.items():
        write(report, folder / f"benchmark.{suffix}")
    LOGGER.info(f"\n{report}\n\nReport: {folder}/benchmark.html, .json, .csv, .md, .png")


def _named(cell: Contender, rows: Sequence[Row]) -> str:
    """The label, and the setting where there are several."""
    settings = {row.setting for row in rows}
    where = f" {cell.precision}, {cell.provider}, batch {cell.batch}, {cell.size[0]}x{cell.size[1]}"
    return cell.label + where * (len(settings) > 1)


def _notes(contenders: list[Contender], rows: Sequence[Row], timed: int) -> list[str]:
    notes = [f"WARNING: FAILED, and so without results: {_named(c, rows)} ({c.failed})" for c in contenders if c.failed]
    for label in dict.fromkeys(c.label for c in contenders if not c.compared):
        alone = next(c for c in contenders if c.label == label).model is None
        why = "is an ONNX file alone" if alone else "detects nothing on the images of the comparison"
        notes.append(f"{'note' if alone else 'WARNING'}: NOT COMPARED with PyTorch: {label} {why}.")
    for label in dict.fromkeys(c.label for c in contenders if c.info is not None and not c.info.limits_known):
        notes.append(f"WARNING: LIMITS UNKNOWN: {label} has its NMS inside, and does not say with which conf and iou.")
    for cell in (c for c in contenders if not c.judged and not c.failed):
        notes.append(
            f"WARNING: NOT JUDGED: {_named(cell, rows)} lost no mAP that max_ap_drop= would refuse, because its fp32 "
            "file has none to lose: train it longer, or see that the split has labels."
        )
    if timed < MANY:
        notes.append(f"note: p95 and p99 of {timed} runs are close to the slowest: ask for {MANY} runs or more.")
    notes += few_images_notes(rows)
    if noise := noise_note(rows):
        notes.append(noise)
    records = {contender.role: contender.record for contender in contenders}
    return notes + (budget_notes(records["model"], records["baseline"]) if "baseline" in records else [])


def _settings(
    contenders: list[Contender], rows: Sequence[Row], arguments: dict[str, Any], images: int, device: str
) -> dict[str, Any]:
    gpu = None if device == "cpu" else get_gpu_info(int(device.partition(":")[2]))
    machine = f"{gpu}, {get_cpu_info()}" if gpu else get_cpu_info()
    threads = arguments["threads"]
    summary = (
        f"{conditions(rows)}, {threads} thread{'s' * (threads > 1)}, "
        f"{machine}; median of {arguments['rounds']} x {arguments['runs']} runs; "
        f"AP on {images} images of {arguments['split']}"
    )
    names = {(c.label if c.role == "other" else c.role): c for c in contenders}
    return {
        "summary": summary,
        "arguments": {**arguments, "thresholds": {name: c.limits for name, c in names.items()}},
        "limits": {"boxes": BOX_LIMIT, "scores": SCORE_LIMIT, "ap": AP_LIMIT, "ap_drop": arguments["max_ap_drop"]},
        "images": images,
        "versions": {
            "gid_yolo": __version__,
            "ultralytics": ultralytics.__version__,
            "torch": torch.__version__,
            "onnxruntime": onnxruntime.__version__,
            "python": platform.python_version(),
        },
        "providers": list(dict.fromkeys(row.provider for row in rows)),
        "cpu": get_cpu_info(),
        "gpu": gpu,
        "threads": threads,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "checkpoints": {
            name: {"path": str(c.path), "fingerprint": c.fingerprint, "record": c.record} for name, c in names.items()
        },
    }
