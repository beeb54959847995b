"""One synthetic image: a textured ground, clutter, objects that overlap, and a camera's faults."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from gid_yolo.data.shapes import (
    CLASSES,
    DISTRACTORS,
    Contour,
    Outline,
    coverage,
    extent,
    extent_inside,
    place,
    unit_outline,
)

Image = NDArray[np.float32]  # (H, W, 3), 0 to 255

MIN_VISIBLE = 0.4  # an object that shows less of itself keeps no label
EMPTY_SHARE = 0.02  # images without objects
MIN_OBJECTS, MAX_OBJECTS = 2, 11
SIDE_RANGE = (0.075, 0.875)  # shares of the image's side: 12 to 140 px of 160
_CONTRAST = 75.0  # least distance of an object's colours from the ground's mean, of 441 from black to white
_TYPICAL_HUE = 0.95  # objects in their class's hue; the rest, and all clutter, have any
_PLACEMENTS = 4  # places tried for an object before it may hide another


@dataclass(frozen=True)
class Scene:
    """An image and its labels.

    `image` is (H, W, 3) uint8 in OpenCV's BGR order; `boxes` (N, 4) xyxy in pixels, the extent of each object in the
    frame as if nothing lay before it; `classes` (N,) indices into `shapes.CLASSES`; `masks` (N, H, W) the pixels of
    which that covers 0.3 or more.
    """

    image: NDArray[np.uint8]
    boxes: NDArray[np.float64]
    classes: NDArray[np.int64]
    masks: NDArray[np.bool_]


@dataclass
class _Placed:
    """An object on the canvas: what it covers, what of that still shows, and its area with the part outside."""

    label: int
    outline: Outline
    cover: NDArray[np.float32]
    visible: NDArray[np.float32]
    area: float

    def share(self) -> float:
        return float(self.visible.sum()) / self.area


def render(rng: np.random.Generator, size: int) -> Scene:
    """Draw one square image of `size` pixels a side; the same generator state gives the same scene."""
    canvas = _ground(rng, size)
    _clutter(rng, canvas)
    placed: list[_Placed] = []
    count = 0 if rng.random() < EMPTY_SHARE else int(rng.integers(MIN_OBJECTS, MAX_OBJECTS + 1))
    low, high = np.log(SIDE_RANGE[0] * size), np.log(SIDE_RANGE[1] * size)
    sides = np.exp(low + (high - low) * rng.random(count) ** 1.15)  # tilted to the small, as COCO's are
    # Mostly the large behind the small: the other order hides most of the small ones.
    for side in sides[np.argsort(-sides * rng.lognormal(0, 0.4, count))]:
        _add_object(rng, canvas, placed, float(side))
    _wires(rng, canvas)
    image = _camera(rng, canvas)

    kept = [o for o in placed if o.share() >= MIN_VISIBLE]
    boxes = np.array([extent_inside(o.outline, size) for o in kept], np.float64).reshape(-1, 4)
    masks = np.array([o.cover >= 0.3 for o in kept], bool).reshape(-1, size, size)
    return Scene(image, boxes.clip(0, size), np.array([o.label for o in kept], np.int64), masks)


def _pattern(rng: np.random.Generator, width: int, height: int, scale: float) -> Image:
    """Return mixing weights (height, width, 1) in [0, 1]: plain, gradient, stripes, checks or noise.

    `scale` is the largest period in pixels.
    """
    kind = rng.choice(["plain", "gradient", "stripes", "checks", "noise"])
    if kind == "plain":
        return np.zeros((height, width, 1), np.float32)
    if kind == "noise":
        cell = max(2.0, scale * rng.uniform(0.15, 0.5))
        grid = rng.random((int(height / cell) + 2, int(width / cell) + 2), dtype=np.float32)
        return cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1)[..., None]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle = rng.uniform(0, np.pi)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    if kind == "gradient":
        along -= along.min()
        weights = along / max(float(along.max()), 1.0)
    else:
        period = max(3.0, scale * rng.uniform(0.25, 1.0))
        weights = np.sin(2 * np.pi * along / period)
        if kind == "checks":
            weights = weights * np.sin(2 * np.pi * across / period)
        weights = (0.5 + 2 * weights).clip(0, 1)  # steep, so that edges are clear without aliasing
    return weights[..., None].astype(np.float32)


def _ground(rng: np.random.Generator, size: int) -> Image:
    colour = (rng.uniform(50, 200) + rng.normal(0, 14, 3)).astype(np.float32)  # greyish, as most grounds are
    canvas = np.full((size, size, 3), colour, np.float32)
    for _ in range(2):
        tint = (rng.normal(0, 18) + rng.normal(0, 7, 3)).astype(np.float32)
        canvas += _pattern(rng, size, size, size * rng.uniform(0.05, 0.5)) * tint
    return canvas


def _class_colour(rng: np.random.Generator, label: int) -> NDArray[np.float64]:
    """Draw a BGR colour (3,) whose hue is typical of a class, within a sixth of the gap to the next class's hue."""
    hue = 180 * (label + rng.normal(0, 1 / 6)) / len(CLASSES) % 180  # OpenCV's hues end at 180
    pixel = np.array([[[hue, rng.uniform(90, 255), rng.uniform(80, 255)]]]).astype(np.uint8)
    return cv2.cvtColor(pixel, cv2.COLOR_HSV2BGR)[0, 0].astype(np.float64)


def _colours(
    rng: np.random.Generator, ground: NDArray[np.float32], label: int | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Draw two colours (3,) that stand out from `ground` (3,), the best of a few draws if none does.

    `label` is the class whose hue the first colour mostly has, None for clutter.
    """
    typical = label is not None and rng.random() < _TYPICAL_HUE
    best, best_gap = None, -1.0
    for _ in range(12):
        first = _class_colour(rng, label) if typical and label is not None else rng.uniform(0, 255, 3)
        second = (first + rng.normal(0, 45, 3)).clip(0, 255)
        gap = min(float(np.linalg.norm(first - ground)), float(np.linalg.norm(second - ground)))
        if gap > best_gap:
            best, best_gap = (first.astype(np.float32), second.astype(np.float32)), gap
        if gap >= _CONTRAST:
            break
    assert best is not None
    return best


def _window(outline: Outline) -> tuple[int, int, int, int]:
    x1, y1, x2, y2 = extent(outline)
    return int(np.floor(x1)), int(np.floor(y1)), int(np.ceil(x2)) + 1, int(np.ceil(y2)) + 1


def _cover(outline: Outline, size: int) -> tuple[NDArray[np.float32], float]:
    """Return the covered share of each image pixel (size, size) and the area in pixels with the part outside."""
    x1, y1, x2, y2 = _window(outline)
    patch = coverage(outline, (x1, y1), (x2 - x1, y2 - y1))
    cover = np.zeros((size, size), np.float32)
    left, top, right, bottom = max(x1, 0), max(y1, 0), min(x2, size), min(y2, size)
    if left < right and top < bottom:
        cover[top:bottom, left:right] = patch[top - y1 : bottom - y1, left - x1 : right - x1]
    return cover, float(patch.sum())


def _fill(
    rng: np.random.Generator, canvas: Image, outline: Outline, cover: NDArray[np.float32], label: int | None = None
) -> None:
    """Paint the covered pixels with two colours mixed by a pattern."""
    size = len(canvas)
    x1, y1, x2, y2 = (min(max(v, 0), size) for v in _window(outline))
    if x1 >= x2 or y1 >= y2:
        return
    region, alpha = canvas[y1:y2, x1:x2], cover[y1:y2, x1:x2, None]
    first, second = _colours(rng, region.mean(axis=(0, 1)), label)
    # Patterns much finer than the object read as texture; coarse ones would cut its shape in pieces.
    paint = first + _pattern(rng, x2 - x1, y2 - y1, 0.4 * max(x2 - x1, y2 - y1)) * (second - first)
    region += alpha * (paint - region)


def _pose(rng: np.random.Generator, kind: str, centre: Contour, side: float) -> Outline:
    return place(unit_outline(kind, rng), centre, side, rng.uniform(0, 2 * np.pi), rng.uniform(0.75, 1.0))


def _add_object(rng: np.random.Generator, canvas: Image, placed: list[_Placed], side: float) -> None:
    label, size = int(rng.integers(len(CLASSES))), len(canvas)
    for _ in range(_PLACEMENTS):
        centre = rng.uniform(0.3 * side, np.maximum(size - 0.3 * side, 0.3 * side + 1), 2)  # may leave the frame a bit
        outline = _pose(rng, CLASSES[label], centre, side)
        cover, area = _cover(outline, size)
        if all(float((o.visible * (1 - cover)).sum()) >= 0.7 * o.area for o in placed):
            break
    _fill(rng, canvas, outline, cover, label)
    for other in placed:
        other.visible *= 1 - cover
    placed.append(_Placed(label, outline, cover, cover.copy(), area))


def _clutter(rng: np.random.Generator, canvas: Image) -> None:
    """Draw what is no object: pieces of shapes and lobes, filled as objects are, and strokes like letters."""
    size = len(canvas)
    for _ in range(rng.integers(0, 3)):
        outline = _pose(rng, str(rng.choice(DISTRACTORS)), rng.uniform(0, size, 2), size * rng.uniform(0.08, 0.35))
        _fill(rng, canvas, outline, _cover(outline, size)[0])
    for _ in range(rng.integers(0, 3)):
        reach = size * rng.uniform(0.04, 0.12)
        stroke = rng.uniform(0, size, 2) + np.cumsum(rng.normal(0, reach, (int(rng.integers(3, 6)), 2)), axis=0)
        _line(rng, canvas, stroke, thickness=int(rng.integers(1, 3)))


def _wires(rng: np.random.Generator, canvas: Image) -> None:
    """Draw thin lines before everything, in some images."""
    if rng.random() < 0.25:
        for _ in range(rng.integers(1, 3)):
            _line(rng, canvas, rng.uniform(-0.2, 1.2, (2, 2)) * len(canvas), thickness=1)


def _line(rng: np.random.Generator, canvas: Image, points: Contour, thickness: int) -> None:
    mask = np.zeros(canvas.shape[:2], np.uint8)
    cv2.polylines(mask, [np.round(points * 16).astype(np.int32)], False, 255, thickness, cv2.LINE_AA, shift=4)
    colour = rng.uniform(0, 255, 3).astype(np.float32)
    canvas += (mask[..., None] / np.float32(255)) * (colour - canvas)


def _camera(rng: np.random.Generator, canvas: Image) -> NDArray[np.uint8]:
    """Apply uneven light, gamma, blur and sensor noise."""
    size = len(canvas)
    y, x = np.mgrid[:size, :size].astype(np.float32) / size - 0.5
    slope, angle = rng.uniform(0, 0.7), rng.uniform(0, 2 * np.pi)
    light = rng.uniform(0.8, 1.1) + slope * (x * np.cos(angle) + y * np.sin(angle))
    image = ((canvas * light[..., None]) / 255).clip(0, 1) ** rng.uniform(0.75, 1.35)
    if (sigma := rng.uniform(0, 0.9)) > 0.3:
        image = cv2.GaussianBlur(image, (0, 0), sigma)
    image = image * 255 + rng.normal(0, rng.uniform(1, 6), image.shape)
    return image.round().clip(0, 255).astype(np.uint8)
