"""The geometry that both pictures of a benchmark share: points, the fronts of the best, axes, places of labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from gid_yolo.export.gains import SAME_LATENCY
from gid_yolo.export.rows import Row, short

_LOG_SPREAD = 5.0  # slowest over fastest from which a linear axis would squeeze the fast ones together
_FEW = 8  # points up to which each is labelled with its numbers
_ROLES = ("model", "baseline", "teacher", "other")
_OTHERS = 6  # colours of models that are none of the three, used in turn


@dataclass(frozen=True)
class Point:
    """A row that passed, in the plane.

    Attributes:
        row: The row.
        x: Milliseconds for one image.
        y: mAP.
        front: True where no row of its provider that is on the front beats it: is better without being slower, or as
            good and faster. Latencies as close as `SAME_LATENCY` are one: else the noise of a clock would put a bad
            twin on the front.
        letter: Stands for batch and size; empty where all rows share them.
    """

    row: Row
    x: float
    y: float
    front: bool
    letter: str


def points(rows: Sequence[Row]) -> list[Point]:
    """The rows that have both numbers."""
    shown = [(row, row.per_image, row.ap) for row in rows]
    plane = [(row, x, y) for row, x, y in shown if x is not None and y is not None]
    letters, front = shapes(rows), _front(plane)
    return [
        Point(row, x, y, i in front, letters.get((row.batch, row.height, row.width), ""))
        for i, (row, x, y) in enumerate(plane)
    ]


def _front(plane: Sequence[tuple[Row, float, float]]) -> set[int]:
    """Places of the rows on a front, found from the most accurate on: whatever could beat a row is judged before it."""
    front: list[int] = []
    for i in sorted(range(len(plane)), key=lambda i: (-plane[i][2], plane[i][1])):
        row, x, y = plane[i]
        rivals = [plane[j][1:] for j in front if plane[j][0].provider == row.provider]
        if not any((b > y and a <= x * (1 + SAME_LATENCY / 100)) or (b == y and a < x) for a, b in rivals):
            front.append(i)
    return set(front)


def shapes(rows: Sequence[Row]) -> dict[tuple[int, int, int], str]:
    """A letter for every batch and size that has a point, in the rows' order; none where there is only one."""
    shown = [row for row in rows if row.per_image is not None and row.ap is not None]
    every = list(dict.fromkeys((row.batch, row.height, row.width) for row in shown))
    return {shape: chr(ord("a") + i) for i, shape in enumerate(every)} if 1 < len(every) <= 26 else {}


def fronts(found: Sequence[Point], end: float) -> dict[str, list[tuple[float, float]]]:
    """Each provider's best mAP within a latency: the corners of a line of steps, from fast to slow up to `end`."""
    lines: dict[str, list[tuple[float, float]]] = {point.row.provider: [] for point in found}
    for point in sorted(found, key=lambda p: (p.x, p.y)):
        line = lines[point.row.provider]
        if point.front:
            line += [(point.x, y) for _, y in line[-1:]] + [(point.x, point.y)]
    return {provider: [*line, (end, line[-1][1])] for provider, line in lines.items()}


def colours(rows: Sequence[Row]) -> dict[tuple[str, str], str]:
    """The colour's name of each model by role and label: its role, and a number for those that have none."""
    models = dict.fromkeys((row.role, row.label) for row in rows)
    others = [model for model in models if model[0] == "other"]
    return {m: f"other{others.index(m) % _OTHERS}" if m[0] == "other" else m[0] for m in models}


@dataclass(frozen=True)
class Axis:
    """From numbers to 0 ... 1.

    Attributes:
        low: At 0.
        high: At 1.
        log: Equal distances are equal ratios.
        ticks: Round numbers inside.
    """

    low: float
    high: float
    log: bool = False
    ticks: tuple[float, ...] = field(default=())

    def at(self, value: float) -> float:
        """Where `value` lies."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def latency_axis(values: Sequence[float]) -> Axis:
    """Logarithmic where the spread is wide; with room for labels at both ends."""
    low, high = min(values), max(values)
    if high / low > _LOG_SPREAD:
        steps = (1, 2, 5) if high / low > 4 * _LOG_SPREAD else (1, 1.5, 2, 3, 5, 7)
        room = (high / low) ** 0.12
        low, high = low / room, high * room
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [n * 10.0**k for k in decades for n in steps]
        return Axis(low, high, True, tuple(tick for tick in ticks if low <= tick <= high))
    room = max(0.15 * (high - low), 0.12 * high)
    return _linear(max(low - room, 0.0), high + room)


def accuracy_axis(values: Sequence[float]) -> Axis:
    """In percent, with room for labels above and below."""
    low, high = min(values), max(values)
    room = max(0.16 * (high - low), 1.0)
    return _linear(max(low - room, 0.0), min(high + room, 102.0))


def _linear(low: float, high: float) -> Axis:
    rough = (high - low) / 6
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * n for n in (1, 2, 5, 10) if unit * n >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(low, high, False, tuple(round(i * step, 10) for i in range(first, last + 1)))


@dataclass(frozen=True)
class Label:
    """Words beside a point: their box in pixels from the upper left, y downwards."""

    index: int
    lines: tuple[str, ...]
    x: float
    y: float
    width: float
    height: float


def labels_of(found: Sequence[Point]) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """What to write beside each point, in full, and in short for where there is no room."""
    precisions, providers = ({getattr(p.row, name) for p in found} for name in ("precision", "provider"))
    words: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    for point in found:
        row = point.row
        extra = [row.precision] * (len(precisions) > 1) + [short(row.provider)] * (len(providers) > 1)
        brief = " ".join([row.label, *extra, *point.letter])
        full = (row.title if not extra else brief, f"{point.y:.1f} mAP, {point.x:.1f} ms")
        words.append((full if len(found) <= _FEW else (brief,), (brief,)))
    return words


def place_labels(
    found: Sequence[Point],
    spots: Sequence[tuple[float, float]],
    size: tuple[float, float],
    lines: Sequence[Sequence[tuple[float, float]]] = (),
    *,
    letter: float,
    line: float,
    radius: float,
) -> list[Label]:
    """Labels where they cover neither a point nor each other; a point without such a place has none.

    Args:
        found: The points.
        spots: Where they are, in pixels.
        size: Width and height of the plane in pixels.
        lines: Corners of lines along the axes, in pixels, which labels cover only where points are few.
        letter: Width of a letter.
        line: Height of a line of words.
        radius: Of a marker.
    """
    words, placed = labels_of(found), []
    taken = [(x - radius, y - radius, x + radius, y + radius) for x, y in spots]
    strokes = [_box(*pair) for corners in lines for pair in pairwise(corners)]
    for i in sorted(range(len(found)), key=lambda i: _rank(found[i])):
        avoided = ([*taken, *strokes], taken)[: 1 + (len(found) <= _FEW)]
        tries = [(text, avoid) for text in dict.fromkeys(words[i]) for avoid in avoided]
        for text, avoid in tries:
            width, height = letter * max(map(len, text)), line * len(text)
            corners = _places(*spots[i], width, height, radius + 3)
            if place := next((xy for xy in corners if _free((*xy, width, height), size, avoid)), None):
                placed.append(Label(i, text, *place, width, height))
                taken.append((*place, place[0] + width, place[1] + height))
                break
    return placed


def _box(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float, float, float]:
    (x, y), (a, b) = one, other
    return min(x, a) - 1, min(y, b) - 1, max(x, a) + 1, max(y, b) + 1


def _free(
    label: tuple[float, float, float, float],
    size: tuple[float, float],
    taken: Sequence[tuple[float, float, float, float]],
) -> bool:
    left, top, right, bottom = label[0], label[1], label[0] + label[2], label[1] + label[3]
    inside = left >= 0 and top >= 0 and right <= size[0] and bottom <= size[1]
    return inside and not any(left < c and a < right and top < d and b < bottom for a, b, c, d in taken)


def _rank(point: Point) -> tuple[bool, bool, int]:
    return not point.front, point.row.precision != "fp32", _ROLES.index(point.row.role)


def _places(x: float, y: float, width: float, height: float, gap: float) -> list[tuple[float, float]]:
    """Upper left corners around a point, the best first."""
    left, middle, right = x - gap - width, x - width / 2, x + gap
    near = 0.7 * gap
    return [
        *((middle, y - gap - height), (middle, y + gap), (right, y - height / 2), (left, y - height / 2)),
        *((x + near, y - near - height), (x - near - width, y - near - height)),
        *((x + near, y + near), (x - near - width, y + near)),
    ]
