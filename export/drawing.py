"""Latency against accuracy as SVG for the page: its colours are the page's, and every point says what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from gid_yolo.export.points import Axis, Point, accuracy_axis, colours, fronts, latency_axis, place_labels, points
from gid_yolo.export.rows import Row, short

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 44  # margins in pixels
_SHAPES = {
    "fp32": '<circle r="7"/>',
    "fp16": '<rect x="-6.3" y="-6.3" width="12.6" height="12.6" rx="1"/>',
    "int8": '<path d="M0-8.6 8.6 0 0 8.6-8.6 0z"/>',
}
_OTHER_SHAPE = '<path d="M0-8.2 8 6.6H-8z"/>'


def shape(precision: str) -> str:
    """The marker of a precision, around (0, 0)."""
    return _SHAPES.get(precision, _OTHER_SHAPE)


def draw(rows: Sequence[Row], marks: Mapping[int, str], width: int, height: int) -> str:
    """An SVG of the rows that passed; empty where there is none.

    Args:
        rows: All rows.
        marks: Attributes that a point shares with its line of the table, by the number of the row.
        width: In pixels.
        height: In pixels.
    """
    found = points(rows)
    if not found:
        return ""
    across, up = latency_axis([point.x for point in found]), accuracy_axis([point.y for point in found])
    wide, high = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM

    def spot(x: float, y: float) -> tuple[float, float]:
        return _LEFT + across.at(x) * wide, _TOP + (1 - up.at(y)) * high

    lines = fronts(found, across.high)
    providers = list(lines)
    parts = [_grid(across, up, spot(across.low, up.low), spot(across.high, up.high))]
    for i, corners in enumerate(lines.values()):
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in (spot(*corner) for corner in corners))
        parts.append(f'<path class="front front{i % 3}" d="{path}"/>')
    names, numbers = colours(rows), {row.key: i for i, row in enumerate(rows)}
    for point in sorted(found, key=lambda p: p.front):  # the best lie on top
        number, hollow = numbers[point.row.key], providers.index(point.row.provider) % 2 == 1
        parts.append(_mark(point, spot(point.x, point.y), names, hollow, marks.get(number, "")))
    spots = [spot(point.x, point.y) for point in found]
    inner = [(x - _LEFT, y - _TOP) for x, y in spots]
    strokes = [[(x - _LEFT, y - _TOP) for x, y in (spot(*c) for c in corners)] for corners in lines.values()]
    for label in place_labels(found, inner, (wide, high), strokes, letter=6.4, line=14.5, radius=8):
        row, centre = found[label.index].row, label.x + label.width / 2 + _LEFT
        attributes = f'class="label c-{names[row.role, row.label]}" {marks.get(numbers[row.key], "")}'
        parts += [
            f'<text {attributes} x="{centre:.1f}" y="{label.y + _TOP + 11 + 14.5 * i:.1f}">{escape(words)}</text>'
            for i, words in enumerate(label.lines)
        ]
    name = f"Latency against mAP of {len(found)} measurements; the table below has the same numbers"
    return f'<svg class="plot" viewBox="0 0 {width} {height}" role="group" aria-label="{name}">{"".join(parts)}</svg>'


def _grid(across: Axis, up: Axis, low: tuple[float, float], high: tuple[float, float]) -> str:
    (left, bottom), (right, top) = low, high
    parts = []
    for tick in across.ticks:
        x = left + across.at(tick) * (right - left)
        parts.append(f'<path class="grid" d="M{x:.1f} {bottom:.1f}V{top:.1f}"/>')
        parts.append(f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{bottom + 17:.1f}">{tick:g}</text>')
    for tick in up.ticks:
        y = bottom + up.at(tick) * (top - bottom)
        parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{left - 7:.1f}" y="{y + 4:.1f}">{tick:g}</text>')
    middle = (bottom + top) / 2
    scale = ", logarithmic" if across.log else ""
    return (
        f'{"".join(parts)}<path class="axis" d="M{left:.1f} {top:.1f}V{bottom:.1f}H{right:.1f}"/>'
        f'<text class="name" text-anchor="middle" x="{(left + right) / 2:.1f}" y="{bottom + 38:.1f}">'
        f"ms per image{scale}</text>"
        f'<text class="name" text-anchor="middle" transform="translate(12 {middle:.1f}) rotate(-90)">mAP in %</text>'
    )


def _mark(
    point: Point, at: tuple[float, float], names: Mapping[tuple[str, str], str], hollow: bool, attributes: str
) -> str:
    row, place = point.row, f'transform="translate({at[0]:.1f} {at[1]:.1f})"'
    kind = f"point c-{names[row.role, row.label]}{' hollow' * hollow}"
    lines = [
        row.title,
        f"{row.precision}, {short(row.provider)}, batch {row.batch}, {row.size}",
        f"{point.y:.1f} mAP",
        f"{point.x:.2f} ms per image" + (f", 95 % within {row.p95 / row.batch:.2f}" if row.p95 else ""),
    ]
    lines += ["on the Pareto front"] if point.front else []
    letter = f"<text>{point.letter}</text>" if point.letter else ""
    tip = escape("\n".join(lines))
    return (
        f'<g class="{kind}" {place} {attributes} tabindex="0" role="img"><title>{tip}</title>'
        f"{shape(row.precision)}{letter}</g>"
    )
