"""Images into a network's input, as Ultralytics trains and predicts: letterbox, RGB, [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from gid_yolo.errors import UserError

PADDING = 114  # grey


@dataclass(frozen=True)
class Fit:
    """Where an image lies in its letterbox, in pixels.

    Attributes:
        inner: Height and width of the resized image.
        before: Padding above and to the left.
        after: Padding below and to the right.
    """

    inner: tuple[int, int]
    before: tuple[int, int]
    after: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the letterbox."""
        return (
            self.before[0] + self.inner[0] + self.after[0],
            self.before[1] + self.inner[1] + self.after[1],
        )


def fit(shape: Sequence[int], size: Sequence[int], stride: int | None = None) -> Fit:
    """Place an image of `shape` (height, width) in the middle of `size`, as large as it can be.

    Args:
        shape: Of the image.
        size: Of the letterbox.
        stride: If given, padding is cut to the least that leaves multiples of it.
    """
    ratio = min(size[0] / shape[0], size[1] / shape[1])
    inner = max(round(shape[0] * ratio), 1), max(round(shape[1] * ratio), 1)
    padding = [outer - side for outer, side in zip(size, inner, strict=True)]
    if stride is not None:
        padding = [side % stride for side in padding]
    # The odd pixel goes below and to the right; 0.1 keeps round() from its rule for halves
    before = round(padding[0] / 2 - 0.1), round(padding[1] / 2 - 0.1)
    after = round(padding[0] / 2 + 0.1), round(padding[1] / 2 + 0.1)
    return Fit(inner, before, after)


def letterbox(image: np.ndarray, place: Fit) -> np.ndarray:
    """Resize (H, W, 3) uint8 with its aspect ratio kept, and fill the rest of the letterbox with grey."""
    if image.shape[:2] != place.inner:
        image = cv2.resize(image, place.inner[::-1], interpolation=cv2.INTER_LINEAR)
    (top, left), (bottom, right) = place.before, place.after
    return cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_CONSTANT, value=(PADDING,) * 3)


def to_input(images: Sequence[np.ndarray], dtype: type = np.float32) -> np.ndarray:
    """(H, W, 3) uint8 BGR images of one size as (B, 3, H, W) RGB in [0, 1]."""
    height, width, _ = images[0].shape
    batch = np.empty((len(images), 3, height, width), np.float32)
    for planes, image in zip(batch, images, strict=True):
        planes[:] = image[..., ::-1].transpose(2, 0, 1)
    batch /= 255  # in place and in fp32: a product with 1 / 255 would differ in the last bit
    return batch.astype(dtype, copy=False)


def read_image(source: str | Path | np.ndarray, *, rgb: bool = False) -> np.ndarray:
    """An image as (H, W, 3) uint8 BGR.

    Args:
        source: File, or uint8 array: (H, W, 3) BGR as cv2 reads it, (H, W) or (H, W, 1) grey, (H, W, 4) with an alpha
            channel, which is dropped.
        rgb: The array is RGB, as PIL reads it.

    Raises:
        UserError: Neither, or a file that is not an image.
    """
    if isinstance(source, str | Path):
        return _read_file(Path(source))
    if not isinstance(source, np.ndarray):
        raise UserError(
            f"an image must be a path or a numpy array, not {type(source).__name__}; of a PIL image, give "
            "numpy.asarray(image.convert('RGB')) with rgb=True."
        )
    if source.dtype != np.uint8:
        raise UserError(f"an image array must be uint8 (0 to 255), not {source.dtype}.")
    image = source[..., None] if source.ndim == 2 else source
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4) or not image.size:
        raise UserError(
            f"an image array must be (height, width, 3), (height, width) or (height, width, 4), not {source.shape}; "
            "give several images as a list."
        )
    if image.shape[2] == 1:
        return np.repeat(image, 3, axis=2)
    return np.ascontiguousarray(image[..., 2::-1] if rgb else image[..., :3])


def _read_file(path: Path) -> np.ndarray:
    try:
        encoded = np.fromfile(path, np.uint8)  # cv2.imread fails on letters outside ASCII on Windows
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    image = cv2.imdecode(encoded, cv2.IMREAD_COLOR) if encoded.size else None
    if image is None:
        raise UserError(f"{path} is not an image that OpenCV {cv2.__version__} can read.")
    return image
