"""Images that are stored on their side, with a note (EXIF) of how to turn them: boxes must be turned with them."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
from PIL import Image

from gid_yolo.data.convert import LabelledImage
from gid_yolo.errors import UserError

_WIDTH, _HEIGHT, _ORIENTATION = 0x0100, 0x0101, 0x0112  # tags of TIFF and EXIF
_SIDEWAYS = (5, 6, 7, 8)


def upright(image: LabelledImage) -> tuple[LabelledImage, bool]:
    """The image's objects in the frame in which Ultralytics decodes it.

    An annotation whose width and height are those of the stored, sideways pixels has its boxes turned with them; one
    with those of the decoded image stays.

    Args:
        image: As it was annotated.

    Returns:
        The image, and False where nothing tells which frame its boxes are of: it is turned by 180 degrees, flipped, or
        square.

    Raises:
        UserError: The annotation does not say its size, and the image is on its side.
    """
    (width, height), orientation = _stored(image)
    if orientation == 1:
        return image, True
    if orientation not in _SIDEWAYS or width == height:
        return image, False
    decoded = cv2.imdecode(np.fromfile(image.path, np.uint8), cv2.IMREAD_COLOR)  # `imread` fails on such TIFFs
    if decoded is None or decoded.shape[:2] == (height, width):  # this reader does not turn this format
        return image, True
    if not image.sized:
        raise UserError(
            f"{image.path} is stored on its side ({width}x{height}, EXIF orientation {orientation}), and its "
            "annotation does not say the size of the image that its boxes are of: add width and height."
        )
    if (image.size[0] > image.size[1]) != (width > height):
        return image, True  # of the decoded image, which is height x width
    boxes = [(label, _turned(box, image.size, orientation)) for label, box in image.objects]
    return replace(image, size=(image.size[1], image.size[0]), objects=boxes), True


def _stored(image: LabelledImage) -> tuple[tuple[int, int], int]:
    """Width and height of the pixels as they are stored, and EXIF's orientation."""
    try:
        with Image.open(image.path) as opened:
            if opened.format == "PNG" and "exif" not in opened.info:  # Pillow would decode it to look behind the pixels
                return opened.size, 1
            tags, size = opened.getexif(), opened.size
            if opened.format == "TIFF":  # whose size Pillow may have turned already
                size = int(tags.get(_WIDTH, size[0])), int(tags.get(_HEIGHT, size[1]))
            return size, int(tags.get(_ORIENTATION, 1))
    except Exception:  # Pillow's readers raise of all kinds; what reads the image next says what is wrong with it
        return (1, 1), 1


def _turned(
    box: tuple[float, float, float, float], size: tuple[float, float], orientation: int
) -> tuple[float, float, float, float]:
    """A box (xyxy, pixels) of an image of (width, height) after it was turned."""
    (x1, y1, x2, y2), (width, height) = box, size
    left, top, right, bottom = y1, x1, y2, x2  # transposed, orientation 5
    if orientation in (6, 7):
        left, right = height - right, height - left
    if orientation in (7, 8):
        top, bottom = width - bottom, width - top
    return left, top, right, bottom
