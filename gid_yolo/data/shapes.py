"""Outlines of the synthetic objects and of the clutter between them, as contours in continuous pixel coordinates.

A contour is an array (P, 2) of x, y. An outline is a list of contours filled by parity: the first is the outer edge,
a second one is a hole. Coordinates are measured on pixel edges: pixel i covers [i, i + 1].
"""

import cv2
import numpy as np
from numpy.typing import NDArray

Contour = NDArray[np.float64]
Outline = list[Contour]

CLASSES = ("disc", "triangle", "star", "cross")
DISTRACTORS = ("half_disc", "ring", "arc", "corner", "bar", "lobes")

_SUPERSAMPLE = 4
_SHIFT = 4  # fractional bits of cv2's fixed-point coordinates


def _polar(radius: float | NDArray[np.float64], start: float, stop: float, points: int, *, closed: bool) -> Contour:
    angle = np.linspace(start, stop, points, endpoint=not closed)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _circle(radius: float) -> Contour:
    return _polar(radius, 0, 2 * np.pi, 72, closed=True)


def unit_outline(name: str, rng: np.random.Generator) -> Outline:
    """Return an outline of the kind `name` (of CLASSES or DISTRACTORS) about the origin, its proportions from `rng`.

    Raises:
        ValueError: `name` is not a kind of outline.

    """
    match name:
        case "disc":
            return [_circle(1.0)]
        case "ring":
            return [_circle(1.0), _circle(rng.uniform(0.45, 0.68))]
        case "triangle":
            return [_polar(1.0, 0, 2 * np.pi, 3, closed=True)]
        case "star":
            radius = np.where(np.arange(10) % 2 == 0, 1.0, rng.uniform(0.38, 0.48))
            return [_polar(radius, 0, 2 * np.pi, 10, closed=True)]
        case "cross":
            arm = rng.uniform(0.24, 0.36)
            quarter = np.array([[1.0, -arm], [1.0, arm], [arm, arm]])
            turns = [np.array([[c, s], [-s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
            return [np.concatenate([quarter @ turn for turn in turns])]
        case "half_disc":
            return [_polar(1.0, 0, np.pi, 36, closed=False)]
        case "arc":  # a ring with a wide gap
            sweep, inner = rng.uniform(0.6, 1.2) * np.pi, rng.uniform(0.6, 0.75)
            return [
                np.concatenate([_polar(1.0, 0, sweep, 40, closed=False), _polar(inner, sweep, 0, 40, closed=False)])
            ]
        case "corner":  # half a cross
            arm = rng.uniform(0.3, 0.5)
            return [np.array([[0.0, 0.0], [2.0, 0.0], [2.0, arm], [arm, arm], [arm, 2.0], [0.0, 2.0]])]
        case "bar":
            half = rng.uniform(0.06, 0.14)
            return [np.array([[-1.0, -half], [1.0, -half], [1.0, half], [-1.0, half]])]
        case "lobes":
            angle = np.linspace(0, 2 * np.pi, 72, endpoint=False)
            waves = 0.25 * np.sin(2 * angle + rng.uniform(0, 6)) + 0.25 * np.sin(3 * angle + rng.uniform(0, 6))
            return [_polar(0.6 + waves, 0, 2 * np.pi, 72, closed=True)]
        case _:
            raise ValueError(f"no outline is named {name!r}, only {', '.join(CLASSES + DISTRACTORS)}")


def place(outline: Outline, centre: Contour, side: float, angle: float, aspect: float) -> Outline:
    """Squeeze (`aspect` in (0, 1], along y), turn by `angle` (radians) and scale an outline, and centre its box.

    `side` is the longer side of the resulting axis-aligned box in pixels, `centre` (2,) the centre of that box.
    """
    cos, sin = np.cos(angle), np.sin(angle)
    turned = [contour * (1.0, aspect) @ np.array([[cos, sin], [-sin, cos]]) for contour in outline]
    x1, y1, x2, y2 = extent(turned)
    scale = side / max(x2 - x1, y2 - y1)
    return [(contour - ((x1 + x2) / 2, (y1 + y2) / 2)) * scale + centre for contour in turned]


def extent(outline: Outline) -> tuple[float, float, float, float]:
    """Return the box x1, y1, x2, y2 of an outline, not clipped."""
    low, high = outline[0].min(axis=0), outline[0].max(axis=0)
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


def extent_inside(outline: Outline, size: int) -> tuple[float, float, float, float]:
    """Return the box x1, y1, x2, y2 of the part of an outline that lies in a frame of `size` pixels a side.

    It can be narrower than the clipped box of the whole: the tip that makes the whole wide may lie outside. An outline
    with nothing in the frame gives a box of zeros.
    """
    points = outline[0]
    # Each side of the frame cuts the polygon (Sutherland and Hodgman); extents come out right for concave ones too.
    for axis, limit, sign in ((0, 0, 1), (1, 0, 1), (0, size, -1), (1, size, -1)):
        depth = sign * (points[:, axis] - limit)  # positive inside
        following, next_depth = np.roll(points, -1, axis=0), np.roll(depth, -1)
        cut = (depth > 0) != (next_depth > 0)
        share = (depth[cut] / (depth[cut] - next_depth[cut]))[:, None]
        crossings = points[cut] + share * (following[cut] - points[cut])
        if not cut.any() and not (depth > 0).all():
            return 0.0, 0.0, 0.0, 0.0
        # Only the box is wanted, but the next cut needs the order: a crossing follows the point before it.
        order = np.concatenate([np.flatnonzero(depth > 0), np.flatnonzero(cut) + 0.5])
        points = np.concatenate([points[depth > 0], crossings])[np.argsort(order)]
    return extent([points])


def coverage(outline: Outline, origin: tuple[int, int], size: tuple[int, int]) -> NDArray[np.float32]:
    """Return the share (height, width) of each pixel that an outline covers, in [0, 1].

    The window's upper left pixel is `origin` (x, y), its `size` is (width, height) in pixels.
    """
    fine = np.zeros((size[1] * _SUPERSAMPLE, size[0] * _SUPERSAMPLE), np.uint8)
    # cv2 counts from pixel centres, hence the half.
    points = [((contour - origin) * _SUPERSAMPLE - 0.5) * 2**_SHIFT for contour in outline]
    cv2.fillPoly(fine, [np.round(p).astype(np.int32) for p in points], 255, lineType=cv2.LINE_8, shift=_SHIFT)
    share = cv2.resize(fine, size, interpolation=cv2.INTER_AREA)
    return share.astype(np.float32) / 255
