"""Latency against accuracy as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gid_yolo.export.gains import gains
from gid_yolo.export.points import (
    Point,
    accuracy_axis,
    colours,
    fronts,
    latency_axis,
    place_labels,
    points,
    shapes,
)
from gid_yolo.export.report import BenchmarkReport
from gid_yolo.export.rows import Row, short
from gid_yolo.files import replaced

_COLOURS = {
    **{"model": "#c1272d", "baseline": "#5a6b7b", "teacher": "#1b6ca8"},
    **{"other0": "#2a7f62", "other1": "#9a6700", "other2": "#7b4fa3"},
    **{"other3": "#00838f", "other4": "#ad1457", "other5": "#5d4037"},
}
_MARKERS = {"fp32": ("o", 8.5), "fp16": ("s", 8.0), "int8": ("D", 8.0)}  # sizes that look alike
_OTHER_MARKER = ("^", 9.0)
_DASHES = ("solid", (0, (5, 2)), (0, (1, 1.5)))  # of the fronts, by provider
_WHISKERS = 12  # points up to which whiskers to p95 do not hide each other
_SIZE, _DPI, _WORDS = (8.4, 5.0), 150, 7.5
_LEFT_OUT = 3  # names of failed rows that fit


def write_png(report: BenchmarkReport, path: Path) -> None:
    """Median latency of an image against mAP, with the front of the best of each provider; without failed rows."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):  # a $ in a name is a $
        figure = _figure(report)
        with replaced(path) as part:
            figure.savefig(part, format="png")


def _figure(report: BenchmarkReport) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel("latency of the network in ms per image (median)")
    axes.set_ylabel("mAP in %")
    axes.grid(True, which="major", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    title = (gains(report.rows, report.comparable) or "latency against accuracy").replace("; ", ";\n")
    axes.set_title(title, loc="left", fontsize=9.5, wrap=True)
    if footer := "\n".join(_footer(report)):
        figure.supxlabel(footer, fontsize=6, color="#707070", x=0.01, ha="left")
    if found := points(report.rows):
        _legend(figure, list(report.rows), found)
        _draw(figure, axes, found, colours(report.rows))
    else:
        words = "no model passed the parity gate" if any(row.failed for row in report.rows) else "nothing to show"
        axes.text(0.5, 0.5, words, ha="center", va="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
    return figure


def left_out(rows: tuple[Row, ...]) -> str:
    """Which rows failed, so that no picture shows them; empty where none did."""
    failed = [f"{row.title} ({row.setting})" for row in rows if row.failed]
    more = f" and {len(failed) - _LEFT_OUT} more" if len(failed) > _LEFT_OUT else ""
    return f"Failed, and so left out: {'; '.join(failed[:_LEFT_OUT])}{more}." if failed else ""


def _footer(report: BenchmarkReport) -> list[str]:
    lines = [report.settings.get("summary", ""), left_out(report.rows)]
    return [line for line in lines if line]


def _draw(figure: Any, axes: Any, found: list[Point], names: dict[tuple[str, str], str]) -> None:
    across, up = latency_axis([point.x for point in found]), accuracy_axis([point.y for point in found])
    if across.log:
        from matplotlib.ticker import NullFormatter, NullLocator

        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(across.low, across.high)
    axes.set_ylim(up.low, up.high)
    axes.set_xticks(across.ticks, [f"{tick:g}" for tick in across.ticks])
    axes.set_yticks(up.ticks, [f"{tick:g}" for tick in up.ticks])

    lines = fronts(found, across.high)
    providers = list(lines)
    for provider, corners in lines.items():
        dashes = _DASHES[providers.index(provider) % len(_DASHES)]
        axes.plot(*zip(*corners, strict=True), color="#9aa3ad", linewidth=1.2, linestyle=dashes, zorder=2)
    for order, point in enumerate(sorted(found, key=lambda p: p.front)):
        colour, (shape, size) = _COLOURS[names[point.row.role, point.row.label]], _marker(point.row)
        hollow = providers.index(point.row.provider) % 2 == 1
        if len(found) <= _WHISKERS and point.row.p95:
            reach = [[0], [max(point.row.p95 / point.row.batch - point.x, 0)]]
            axes.errorbar(point.x, point.y, xerr=reach, color=colour, alpha=0.4, capsize=2.5, linewidth=1, zorder=2)
        face = "white" if hollow else colour
        above = 4 + order / len(found)  # a letter goes under the next marker with its own
        axes.plot(point.x, point.y, shape, mfc=face, mec=colour, mew=1.2, markersize=size, zorder=above)
        if point.letter:
            ink = colour if hollow else "white"
            middle = {"ha": "center", "va": "center_baseline", "fontweight": "bold"}
            axes.text(point.x, point.y, point.letter, fontsize=5.5, color=ink, zorder=above, **middle)

    figure.draw_without_rendering()  # settles the layout, so that labels can be placed in pixels
    box, pixel = axes.get_window_extent(), _DPI / 72

    def pixels(x: float, y: float) -> tuple[float, float]:
        return across.at(x) * box.width, (1 - up.at(y)) * box.height

    spots = [pixels(point.x, point.y) for point in found]
    strokes = [[pixels(*corner) for corner in corners] for corners in lines.values()]
    metrics = {"letter": 0.54 * _WORDS * pixel, "line": 1.28 * _WORDS * pixel, "radius": 5.5 * pixel}
    for label in place_labels(found, spots, (box.width, box.height), strokes, **metrics):
        row = found[label.index].row
        centre = ((label.x + label.width / 2) / box.width, 1 - (label.y + label.height / 2) / box.height)
        axes.text(
            *centre,
            "\n".join(label.lines),
            transform=axes.transAxes,
            ha="center",
            va="center",
            fontsize=_WORDS,
            linespacing=1.15,
            color=_COLOURS[names[row.role, row.label]],
            zorder=7,
        )


def _marker(row: Row) -> tuple[str, float]:
    return _MARKERS.get(row.precision, _OTHER_MARKER)


def _legend(figure: Any, rows: list[Row], found: list[Point]) -> None:
    """Only what the picture shows: models, and precisions, providers and sizes where there are several."""
    from matplotlib.lines import Line2D

    def entry(label: str, **style: Any) -> Any:
        return Line2D([], [], label=label, linestyle=style.pop("linestyle", "none"), **style)

    names, shown = colours(rows), list(dict.fromkeys((p.row.role, p.row.label, p.row.title) for p in found))
    entries = [entry(title, marker="o", color=_COLOURS[names[role, label]]) for role, label, title in shown]
    grey = {"color": "#4a4a4a"}
    precisions = {p.row.precision: _marker(p.row) for p in found}
    if len(precisions) > 1:
        entries += [entry(name, marker=m, ms=size - 1.5, **grey) for name, (m, size) in precisions.items()]
    providers = list(fronts(found, 0.0))
    for i, provider in enumerate(providers):
        line = {"color": "#9aa3ad", "linestyle": _DASHES[i % len(_DASHES)]}
        if len(providers) > 1:
            line |= {"marker": "o", "mec": "#4a4a4a", "mfc": "white" if i % 2 else "#4a4a4a"}
        entries.append(entry("best of " + short(provider) if len(providers) > 1 else "the best (Pareto front)", **line))
    for (batch, height, width), letter in shapes([p.row for p in found]).items():
        entries.append(entry(f"{letter}  {height}x{width}, batch {batch}"))
    figure.legend(handles=entries, loc="outside right upper", fontsize=_WORDS, frameon=False)
