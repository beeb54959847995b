"""Label files, against what Ultralytics does with them."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ultralytics.data.utils import verify_image_label

from gid_yolo.data.labels import label_problems, read_boxes

CASES = 400
NUMBERS = st.one_of(
    st.sampled_from(["0", "1", "2", "0.5", "1.005", "1.02", "-0.005", "-0.02", "nan", "inf", "-inf", "1e40", "0.1.2"]),
    st.floats(0, 1, width=32).map(str),
    st.floats(width=32).map(str),
    st.integers(-3, 5).map(str),
    st.text(max_size=4),
)
ROWS = st.one_of(
    st.tuples(st.sampled_from(["0", "1", "2"]), *[st.floats(0, 1, width=32).map(str)] * 4),
    st.lists(NUMBERS, min_size=5, max_size=5),
    st.lists(NUMBERS, max_size=9),
)
FILES = st.one_of(
    st.lists(ROWS.map(" ".join), max_size=4).map("\n".join).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.binary(max_size=40),
)


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images") / "a.png"
    cv2.imwrite(str(path), np.zeros((20, 20, 3), np.uint8))
    return path


@settings(max_examples=CASES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(contents=FILES, classes=st.sampled_from([1, 3]), single=st.booleans())
def test_a_file_has_problems_where_ultralytics_refuses_it(image, contents, classes, single):
    path = image.with_suffix(".txt")
    path.write_bytes(contents)
    refused = verify_image_label((str(image), str(path), "", False, 1 if single else classes, 0, 0, single))[8] == 1
    assert bool(label_problems(path, None if single else classes)) == refused


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("0 0.5 0.5 nan 0.1", "'0 0.5 0.5 nan 0.1' holds NaN or infinite values"),
        ("0 0.5 0.5 -0.2 0.1", "-0.2 is negative"),
        ("0 0.5 64 0.2 0.1", "64 is outside the image"),
        ("7 0.5 0.5 0.2 0.1", "class 7 does not exist: the data names 0 to 1"),
        ("-1 0.5 0.5 0.2 0.1", "class -1 is no whole number of at least 0"),
        ("0.5 0.5 0.5 0.2 0.1", "class 0.5 is no whole number"),
        ("cat 0.5 0.5 0.2 0.1", "'cat 0.5 0.5 0.2 0.1' are no numbers"),
        ("0 0.5 0.5 0.2", "4 values, not the 5"),
    ],
)
def test_the_line_and_the_reason_are_said(tmp_path, line, reason):
    path = tmp_path / "a.txt"
    path.write_text(f"\n1 0.5 0.5 0.1 0.1\n{line}\n0 0.1 0.1 0.1 0.1\n")
    (found,) = label_problems(path, 2)
    assert found.startswith(f"{path}:3: {reason}")


def test_polygons(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("0 0.1 0.1 0.5 0.1 0.5 0.5\n0 0.5 0.5 0.1 0.1\n")
    (found,) = label_problems(path, 2)
    assert found.startswith(f"{path}:2: 5 values, where other lines of the file are polygons")


def test_a_file_that_cannot_be_read_says_so(tmp_path):
    assert label_problems(tmp_path, 2) == [f"{tmp_path}: it cannot be read (Is a directory)"]


def test_boxes_are_read_as_ultralytics_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeff0 0.1 0.1 0.4 0.1 0.4 0.5\n\n1 0.5 0.5 0.8 0.5 0.8 0.8 0.5 0.8\n".encode())
    # Around (0.1, 0.1), (0.4, 0.1), (0.4, 0.5) lies x 0.1 to 0.4, y 0.1 to 0.5
    np.testing.assert_allclose(read_boxes(file), [[0.25, 0.3, 0.3, 0.4], [0.65, 0.65, 0.3, 0.3]])
    file.write_text("1 0.5 0.25 0.5 0.5\n")
    assert read_boxes(file) == [[0.5, 0.25, 0.5, 0.5]]
    file.write_text("\n")
    assert read_boxes(file) == []
    for wrong in ("0 0.1 0.1", "0 0.1 0.1 0.2 0.2 0.3", "0 a b c d", "0 0.1 0.1 0.2 0.2\n0 0 0 1 0 1 1"):
        file.write_text(wrong)
        with pytest.raises(ValueError, match=r"values in a line|could not convert"):
            read_boxes(file)
