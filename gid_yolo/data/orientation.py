"""Images that are stored turned, with a note (EXIF) of how to turn them: every reader of images does, so boxes must."""

from __future__ import annotations

from dataclasses import replace

from PIL import Image

from gid_yolo.data.convert import LabelledImage
from gid_yolo.errors import UserError

_ORIENTATION = 0x0112  # EXIF's tag
_SIDEWAYS = (5, 6, 7, 8)


def upright(image: LabelledImage) -> LabelledImage:
    """The image's objects in the frame in which it is decoded.

    An annotation whose width and height are those of the stored, sideways pixels has its boxes turned with them; one
    with those of the decoded image stays.

    Args:
        image: As it was annotated.

    Raises:
        UserError: The annotation does not say its size, and the image is turned.
    """
    stored, orientation = _stored(image)
    if orientation not in _SIDEWAYS or stored[0] == stored[1]:
        return image
    width, height = stored
    if not image.sized:
        raise UserError(
            f"{image.path} is stored on its side ({width}x{height}, EXIF orientation {orientation}), and its "
            "annotation does not say the size of the image that its boxes are of: add width and height."
        )
    if (image.size[0] > image.size[1]) != (width > height):
        return image  # of the decoded image, which is height x width
    return replace(
        image,
        size=(image.size[1], image.size[0]),
        objects=[(label, _turned(box, image.size, orientation)) for label, box in image.objects],
    )


def _stored(image: LabelledImage) -> tuple[tuple[int, int], int]:
    """Width and height of the pixels as they are stored, and EXIF's orientation."""
    try:
        with Image.open(image.path) as opened:
            return opened.size, opened.getexif().get(_ORIENTATION, 1)
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
