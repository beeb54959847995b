"""Latency against accuracy as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from gid_yolo.export.report import BenchmarkReport, Row, gains, replace_file

_COLOURS = {"model": "#c1272d", "baseline": "#5a6b7b", "teacher": "#1b6ca8"}
_MARKERS = {"model": "o", "baseline": "s", "teacher": "^"}
_LOG_SPREAD = 5.0  # slowest over fastest from which a linear axis would squeeze the fast ones together


def write_png(report: BenchmarkReport, path: Path) -> None:
    """Median latency (whiskers to p95) against mAP, one labelled point for each model that passed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rows = [row for row in report.rows if row.failed is None and row.ap is not None and row.p50]
    if rows:
        _points(axes, rows)
    else:
        axes.text(0.5, 0.5, "no model passed the parity gate", ha="center", va="center", transform=axes.transAxes)
    axes.set_xlabel("latency in ms per batch: median, whisker to p95")
    axes.set_ylabel("mAP in %")
    axes.grid(True, which="major", color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    title = (gains(report.rows) or "latency against accuracy").replace("; ", ";\n")
    axes.set_title(title, loc="left", fontsize=9.5)
    if "summary" in report.settings:
        figure.supxlabel(report.settings["summary"], fontsize=6, color="#707070")
    replace_file(path, lambda part: figure.savefig(part, format="png"))


def _points(axes: Any, rows: list[Row]) -> None:
    xs, ys = [row.p50 or 0.0 for row in rows], [row.ap or 0.0 for row in rows]
    log = max(xs) / min(xs) > _LOG_SPREAD
    for row, x, y in zip(rows, xs, ys, strict=True):
        colour = _COLOURS[row.role]
        axes.errorbar(x, y, xerr=[[0], [max((row.p95 or x) - x, 0)]], color=colour, alpha=0.45, capsize=3, linewidth=1)
        axes.plot(x, y, _MARKERS[row.role], color=colour, markersize=8, zorder=4 if row.role == "model" else 3)
    # Models of one kind have one latency, so their labels would meet: the better one's goes above, the other's below
    order = sorted(range(len(rows)), key=lambda i: ys[i])
    for rank, i in enumerate(order):
        below = any(_near(xs[i], xs[j], log, xs) for j in order[rank + 1 :])
        axes.annotate(
            f"{rows[i].label} {rows[i].name}\n{ys[i]:.1f} mAP, {xs[i]:.1f} ms",
            (xs[i], ys[i]),
            xytext=(0, -10 if below else 10),
            textcoords="offset points",
            ha="center",
            va="top" if below else "bottom",
            fontsize=8,
            color=_COLOURS[rows[i].role],
        )
    _limits(axes, xs, ys, log)


def _near(x: float, other: float, log: bool, xs: list[float]) -> bool:
    """True where two labels side by side would overlap: closer than a third of the axis."""
    scale = math.log if log else float
    return abs(scale(x) - scale(other)) < (scale(max(xs)) - scale(min(xs))) / 3 or max(xs) < 1.5 * min(xs)


def _limits(axes: Any, xs: list[float], ys: list[float], log: bool) -> None:
    """Room for the labels on every side."""
    low, high = min(xs), max(xs)
    if log:
        from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(low / (high / low) ** 0.22, high * (high / low) ** 0.22)
    else:
        margin = max(0.22 * (high - low), 0.25 * high)
        axes.set_xlim(max(low - margin, 0), high + margin)
    room = max(0.3 * (max(ys) - min(ys)), 1.0)
    axes.set_ylim(min(ys) - room, max(ys) + room)
    axes.set_yticks([tick for tick in axes.get_yticks() if min(ys) - room <= tick <= max(ys) + room and tick >= 0])
