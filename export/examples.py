"""Images of the split with what each model finds on them, side by side, for the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from PIL import Image

from gid_yolo.export.rows import Detections, Example

SIDE = 480  # longest side of an image in the page, in pixels
SHOWN, LEAST = 0.3, 0.1  # scores from which a box is shown at first, and is in the page at all
MATCH_IOU = 0.5
_MOST = 100  # boxes of one model on one image
_COLOURS = 8  # of classes, used in turn


def match(found: Detections, true_boxes: np.ndarray, true_classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give each object the detection that finds it: of its class, by score, each to the nearest object still free.

    What a detection gets does not depend on those of lower scores, so that one matching serves every threshold.

    Args:
        found: N detections, sorted by score, the best first.
        true_boxes: (M, 4) xyxy.
        true_classes: (M,).

    Returns:
        (N,) whether a detection finds an object, and (M,) the score at which an object was found, or NaN.
    """
    right, scores = np.zeros(len(found.boxes), bool), np.full(len(true_boxes), np.nan)
    overlap = _iou(found.boxes, true_boxes)  # (N, M)
    overlap[np.asarray(found.classes)[:, None] != np.asarray(true_classes)[None]] = 0.0
    for i, score in enumerate(found.scores):
        if not len(true_boxes):
            break
        free = np.where(np.isnan(scores), overlap[i], 0.0)
        best = int(free.argmax())
        if free[best] >= MATCH_IOU:
            right[i], scores[best] = True, score
    return right, scores


def _iou(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (one, other)]
    union = areas[0][:, None] + areas[1][None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def figures(example: Example, number: int, slots: Mapping[int, int]) -> str:
    """One image as a row of figures: its objects, then what each model finds.

    Args:
        example: The image.
        number: Of the example: the image is in the page once, under this number.
        slots: Colour of each class.
    """
    address, scale, (width, height) = _picture(example.image)
    true_boxes = np.asarray(example.true_boxes, float).reshape(-1, 4) * scale
    true_classes = np.asarray(example.true_classes).astype(int).reshape(-1)
    source = f'<image id="example{number}" href="{address}" width="{width}" height="{height}"/>'
    frame = (width, height)
    marks = [
        _rect(box, "box", slots[c], _name(example, c)) for box, c in zip(true_boxes, true_classes.tolist(), strict=True)
    ]
    caption = _count(len(marks), "object")
    parts = [_figure("ground truth", source + "".join(marks), frame, caption, f"{example.name}, ground truth")]
    for label, raw in example.detections.items():
        found = _usable(raw, scale)
        right, scores = match(found, true_boxes, true_classes)
        marks = [f'<use href="#example{number}"/>']
        for box, c, score in zip(true_boxes, true_classes.tolist(), scores.tolist(), strict=True):
            data = f'data-found="{score:.4f}"' if score == score else "data-found"
            marks.append(_rect(box, "missed", slots[c], f"missed: {_name(example, c)}", data, score >= SHOWN))
        for box, c, score, hit in zip(found.boxes, found.classes.tolist(), found.scores.tolist(), right, strict=True):
            kind, data = "box hit" if hit else "box false", f'data-score="{score:.4f}"'
            marks.append(_rect(box, kind, slots[c], f"{_name(example, c)} {score:.2f}", data, score < SHOWN))
        shown = found.scores >= SHOWN
        caption = summary(int((right & shown).sum()), len(true_boxes), int((~right & shown).sum()))
        parts.append(_figure(label, "".join(marks), frame, caption, f"{example.name}, {label}"))
    return f'<div class="example"><h3>{escape(example.name)}</h3><div class="panels">{"".join(parts)}</div></div>'


def summary(found: int, objects: int, false: int) -> str:
    """What a model did on an image; the page's script writes the same."""
    return f"{found} of {objects} found, {false} false"


def slots_of(examples: Sequence[Example]) -> dict[int, int]:
    """A colour for every class that is shown, in the order of the classes."""
    classes: set[int] = set()
    for example in examples:
        classes |= set(np.asarray(example.true_classes).astype(int).reshape(-1).tolist())
        for found in example.detections.values():
            classes |= set(_usable(found, 1.0).classes.tolist())
    return {c: i % _COLOURS for i, c in enumerate(sorted(classes))}


def _usable(found: Detections, scale: float) -> Detections:
    """The best detections, sorted by score, without those that nothing could be drawn of."""
    boxes = np.asarray(found.boxes, float).reshape(-1, 4) * scale
    scores, classes = np.asarray(found.scores, float).reshape(-1).round(4), np.asarray(found.classes).reshape(-1)
    keep = np.isfinite(boxes).all(1) & (scores >= LEAST)
    order = np.flatnonzero(keep)[np.argsort(-scores[keep], kind="stable")][:_MOST]
    return Detections(boxes[order], scores[order], classes[order].astype(int))


def _picture(image: np.ndarray) -> tuple[str, float, tuple[int, int]]:
    """A small JPEG as a data: URI, how much smaller it is, and its width and height."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    scale = min(1.0, SIDE / max(picture.size))
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    stream = io.BytesIO()
    picture.resize(size, Image.Resampling.LANCZOS).save(stream, "JPEG", quality=80, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}", scale, size


def _rect(box: np.ndarray, kind: str, slot: int, title: str, data: str = "", hidden: bool = False) -> str:
    x, y, right, bottom = box.tolist()
    place = f'x="{x:.1f}" y="{y:.1f}" width="{max(right - x, 0):.1f}" height="{max(bottom - y, 0):.1f}"'
    return f'<rect class="{kind} k{slot}" {place} {data}{" hidden" * hidden}><title>{escape(title)}</title></rect>'


def _figure(label: str, inside: str, size: tuple[int, int], caption: str, name: str) -> str:
    words = escape(f"{name}: {caption}")
    return (
        f'<figure><svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{words}">{inside}</svg>'
        f"<figcaption><b>{escape(label)}</b> <span>{caption}</span></figcaption></figure>"
    )


def _name(example: Example, index: int) -> str:
    return str(example.names.get(index, index))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
