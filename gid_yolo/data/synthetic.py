"""The embedded default data set: simple shapes in hard pictures, drawn on first use.

It needs no download and trains in minutes on a CPU. Shape says the class, and hue hints at it (19 objects in 20 have
their class's hue, as real objects have typical colours); texture, size and rotation do not. On 160 px images the sides
of objects run from 12 to 140 px, so that all three of COCO's area ranges (below 32², to 96², above, in pixels) are
there.
"""

from pathlib import Path

import cv2
import numpy as np
import yaml

from gid_yolo.data.cache import DATA_YAML, cache_dir, write_once
from gid_yolo.data.scene import Scene, render
from gid_yolo.data.shapes import CLASSES

IMAGE_SIZE = 160
COUNTS = {"train": 360, "val": 90, "test": 90}
_VERSION = "synthetic-v1"  # a change of any drawing step needs a new one: caches keep the old pictures
_SEED = 20210303


def synthetic_dataset(
    root: Path | None = None, *, image_size: int = IMAGE_SIZE, counts: dict[str, int] | None = None
) -> Path:
    """Return the ``data.yaml`` of the synthetic set, drawing the set first if it is not there yet.

    Args:
        root: the folder of the set; by default ``synthetic-v1`` in the cache, with the size and the counts in its name
            where they are not the default ones. A set that exists is used as it is.
        image_size: side of the square images in pixels.
        counts: images of each split, ``train`` and ``val`` among them.

    Raises:
        UserError: the folder cannot be written.

    """
    counts = COUNTS if counts is None else counts
    if root is None:
        sizes = "" if (image_size, counts) == (IMAGE_SIZE, COUNTS) else f"-{image_size}px"
        root = cache_dir() / (_VERSION + "".join([sizes, *(f"-{n}" for n in counts.values() if sizes)]))

    def write(folder: Path) -> None:
        for split, count in counts.items():
            (folder / "images" / split).mkdir(parents=True)
            (folder / "labels" / split).mkdir(parents=True)
            for index in range(count):
                _write_image(folder, split, index, draw(split, index, image_size))
        data: dict[str, object] = {split: f"images/{split}" for split in counts}
        data["names"] = dict(enumerate(CLASSES))
        (folder / DATA_YAML).write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")

    return write_once(root, write)


def is_embedded(data: object) -> bool:
    """True for the path of the set as this version draws it, in this cache or in another that may be gone."""
    return Path(str(data)).name == DATA_YAML and Path(str(data)).parent.name == _VERSION


def draw(split: str, index: int, image_size: int = IMAGE_SIZE) -> Scene:
    """Draw image `index` of a split: each has its own random stream, so a larger set extends a smaller one."""
    return render(np.random.default_rng([_SEED, *split.encode(), index]), image_size)


def _write_image(folder: Path, split: str, index: int, scene: Scene) -> None:
    # Quality 95 keeps the shapes of 8 px and takes a fifth of PNG's space, for noise does not compress losslessly.
    _, encoded = cv2.imencode(".jpg", scene.image, [cv2.IMWRITE_JPEG_QUALITY, 95])
    (folder / "images" / split / f"{index:05d}.jpg").write_bytes(encoded.tobytes())
    height, width = scene.image.shape[:2]
    corners = scene.boxes / (width, height, width, height)
    rows = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], axis=1)
    lines = [f"{label} " + " ".join(f"{v:.6f}" for v in row) for label, row in zip(scene.classes, rows, strict=True)]
    (folder / "labels" / split / f"{index:05d}.txt").write_text("".join(f"{line}\n" for line in lines))
