"""Images that are stored turned: boxes are where the decoded image shows their objects."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ultralytics.utils.patches import imread

from gid_yolo.data.convert import LabelledImage, find_images, prepare_data
from gid_yolo.data.orientation import upright
from gid_yolo.errors import UserError

BOX = (8.0, 24.0, 40.0, 32.0)  # xyxy of the stored pixels, 96 x 64; on JPEG's blocks of 8


SUFFIXES = ("jpg", "png", "webp", "tif")


def stored(path: Path, orientation: int) -> Path:
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[24:32, 8:40] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    Image.fromarray(pixels).save(path, exif=exif, quality=100, **lossless)
    return path


def shown(path: Path) -> tuple[tuple[float, float], tuple[float, ...]]:
    """Size of the image as Ultralytics decodes it, and the box around what is bright in it."""
    bright = imread(path)[..., 0] > 128
    rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    return bright.shape[::-1], (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("orientation", [1, 5, 6, 7, 8])
def test_boxes_of_the_stored_pixels_are_turned_with_them(tmp_path, orientation: int, suffix: str) -> None:
    path = stored(tmp_path / f"a.{suffix}", orientation)
    found, known = upright(LabelledImage(path, Path("a.jpg"), (96, 64), [(3, BOX)]))
    assert known
    assert (found.size, found.objects[0][1]) == shown(path)
    assert found.objects[0][0] == 3
    # Annotated on the same image at twice the size
    double, _ = upright(LabelledImage(path, Path("a.jpg"), (192, 128), [(3, tuple(2 * x for x in BOX))]))
    assert double.size == tuple(2 * x for x in found.size)
    assert double.objects[0][1] == tuple(2 * x for x in found.objects[0][1])


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("orientation", [1, 5, 6, 7, 8])
def test_boxes_of_the_decoded_image_stay(tmp_path, orientation: int, suffix: str) -> None:
    path = stored(tmp_path / f"a.{suffix}", orientation)
    size, box = shown(path)
    image = LabelledImage(path, Path("a.jpg"), size, [(0, box)])
    assert upright(image) == (image, True)


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_what_sizes_do_not_tell_is_doubtful(tmp_path, orientation: int) -> None:
    image = LabelledImage(stored(tmp_path / "a.jpg", orientation), Path("a.jpg"), (96, 64), [(0, BOX)])
    assert upright(image) == (image, False)


def test_an_annotation_that_does_not_say_which_is_refused(tmp_path) -> None:
    image = LabelledImage(stored(tmp_path / "a.jpg", 6), Path("a.jpg"), (96, 64), [(0, BOX)], sized=False)
    with pytest.raises(UserError, match=r"a\.jpg is stored on its side \(96x64, EXIF orientation 6\)"):
        upright(image)
    stored(tmp_path / "a.jpg", 1)
    assert upright(image) == (image, True)


def test_a_voc_folder_of_turned_images(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GID_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "voc"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    for split, name in (("train", "a"), ("val", "b")):
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(name)
        image = stored(root / "JPEGImages" / f"{name}.jpg", 6)
        corners = "<xmin>9</xmin><ymin>25</ymin><xmax>40</xmax><ymax>32</ymax>"  # from 1 on, the last included
        (root / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename><size><width>96</width><height>64</height></size>"
            f"<object><name>x</name><bndbox>{corners}</bndbox></object></annotation>"
        )
    words = (prepare_data(root).parent / "labels" / "train" / "a.txt").read_text().split()
    (width, height), (x1, y1, x2, y2) = shown(image)
    expected = [0, (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]
    np.testing.assert_allclose([float(x) for x in words], expected, atol=1e-6)


def test_images_behind_links_are_found(tmp_path) -> None:
    far = tmp_path / "far"
    far.mkdir()
    stored(far / "a.jpg", 1)
    root = tmp_path / "set"
    (root / "images").mkdir(parents=True)
    (root / "images" / "link").symlink_to(far, target_is_directory=True)
    (far / "back").symlink_to(root, target_is_directory=True)  # and no walk without an end
    assert find_images(root) == [root / "images" / "link" / "a.jpg"]


def test_a_link_beside_what_it_leads_to_is_no_second_image(tmp_path) -> None:
    (tmp_path / "zz").mkdir()
    stored(tmp_path / "zz" / "a.jpg", 1)
    (tmp_path / "aa").symlink_to(tmp_path / "zz", target_is_directory=True)
    assert find_images(tmp_path) == [tmp_path / "zz" / "a.jpg"]
