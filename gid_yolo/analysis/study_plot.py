"""The picture of a study: mAP against epochs and against the time of training, every seed's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ultralytics.utils import plt_settings

from gid_yolo.analysis.study_plan import Run, Study
from gid_yolo.engine.curves import read_curve
from gid_yolo.files import replaced

Curve = Sequence[tuple[int, float, float]]  # epoch, seconds, mAP in percent


def draw_study(study: Study, runs: Path, path: Path) -> bool:
    """Draw what the runs of a study have logged so far, a pair of axes for each of its groups.

    The teacher is the best epoch of its own training, where its run is there.

    Args:
        study: The table.
        runs: Folder of its runs.
        path: The picture.

    Returns:
        Whether there was anything to draw.
    """
    groups: dict[str, dict[str, list[Curve]]] = {}
    teachers: dict[str, float] = {}
    for row in study.rows:
        found = [curve for run in row.runs.values() if (curve := _curve(run, runs))]
        if row.kind != "teacher":
            groups.setdefault(row.group, {})[row.name] = found
        elif found:
            teachers[row.group] = max(value for *_, value in found[0])
    if not any(curves for rows in groups.values() for curves in rows.values()):
        return False
    plot_curves(groups, path, teachers)
    return True


def _curve(run: Run, runs: Path) -> Curve:
    home = runs / run.name
    if run.checkpoint is not None:  # trained elsewhere
        if run.checkpoint.parent.name != "weights":  # and moved away from what its training logged
            return []
        home = run.checkpoint.parent.parent
    with suppress(OSError, ValueError):
        return read_curve(home / "results.csv")
    return []


@plt_settings()
def plot_curves(
    groups: Mapping[str, Mapping[str, Sequence[Curve]]], path: Path, teachers: Mapping[str, float] | None = None
) -> None:
    """Draw curves, those of a row in one colour.

    They are Ultralytics' mAP on the validation images after every epoch, which lies a little above COCO's.

    Args:
        groups: Of every group's rows the curve of each seed.
        path: The picture.
        teachers: mAP of the groups' teachers, as far as they are known.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(groups), 2, figsize=(10, 4 * len(groups)), sharey="row", squeeze=False, tight_layout=True
    )
    for (group, rows), (by_epoch, by_minute) in zip(groups.items(), axes, strict=True):
        for number, (row, curves) in enumerate(rows.items()):
            for i, curve in enumerate(curve for curve in curves if curve):
                epochs, seconds, values = zip(*curve, strict=True)
                style = {"color": f"C{number}", "linewidth": 1, "label": None if i else row}
                by_epoch.plot(epochs, values, **style)
                by_minute.plot([s / 60 for s in seconds], values, **style)
        for axis in (by_epoch, by_minute):
            if teachers and group in teachers:
                axis.axhline(teachers[group], color="grey", linestyle=":", label="teacher")
        by_epoch.set(xlabel="epochs", ylabel="mAP on val", title=group if len(groups) > 1 else None)
        by_minute.set(xlabel="minutes of training")
        by_minute.legend()
    with replaced(path) as part:
        figure.savefig(part, dpi=150, format=path.suffix[1:])
    plt.close(figure)
