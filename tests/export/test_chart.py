import itertools

import pytest
from PIL import Image
from report_helpers import CUDA, make_matrix, make_row

from gid_yolo.export.chart import left_out, write_png
from gid_yolo.export.points import (
    accuracy_axis,
    colours,
    fronts,
    labels_of,
    latency_axis,
    place_labels,
    points,
    shapes,
)
from gid_yolo.export.report import BenchmarkReport


def plane(*pairs, **others):
    return points([make_row("other", ap, ms, label=str(i), **others) for i, (ms, ap) in enumerate(pairs)])


def test_points_are_images_and_only_of_rows_that_passed():
    rows = [make_row("model", batch=4, p50=40.0), make_row("baseline", failed="x"), make_row("teacher", ap=-1.0)]
    assert [(p.x, p.y, p.front, p.letter) for p in points(rows)] == [(10.0, 30.0, True, "")]


def test_the_front_is_what_no_other_beats():
    found = plane((10, 30), (20, 25), (20, 40), (30, 40), (40, 50), (9, 20))
    assert [p.front for p in found] == [True, False, True, False, True, True]


def test_a_bad_twin_is_not_on_the_front_for_the_noise_of_a_clock():
    assert [p.front for p in plane((10.0, 40), (9.9, 20))] == [True, False]
    assert [p.front for p in plane((10.0, 40), (9.4, 20))] == [True, True]
    assert [p.front for p in plane((10.0, 40), (10.0, 40))] == [True, True]


def test_only_the_front_beats():
    # each within 5 % of the next, but the first is 8 % faster than the last: beaten by what is beaten itself, it stays
    assert [p.front for p in plane((10.0, 20), (10.4, 30), (10.8, 40))] == [True, False, True]


def test_each_provider_has_its_front():
    rows = [make_row("model", 40.0, 10.0), make_row("model", 40.0, 2.0, provider=CUDA)]
    rows += [make_row("teacher", 50.0, 40.0), make_row("teacher", 50.0, 4.0, provider=CUDA)]
    assert fronts(points(rows), 99.0) == {
        "CPUExecutionProvider": [(10.0, 40.0), (40.0, 40.0), (40.0, 50.0), (99.0, 50.0)],
        CUDA: [(2.0, 40.0), (4.0, 40.0), (4.0, 50.0), (99.0, 50.0)],
    }


def test_sizes_and_batches_get_letters_where_there_are_several():
    assert shapes([make_row("model"), make_row("teacher")]) == {}
    rows = [make_row("model"), make_row("model", batch=8), make_row("model", height=64, width=64)]
    assert shapes(rows) == {(1, 256, 320): "a", (8, 256, 320): "b", (1, 64, 64): "c"}
    assert labels_of(points(rows))[1][1] == ("distilled b",)


def test_other_models_take_colours_in_turn():
    rows = [make_row("model"), *(make_row("other", label=name) for name in "abcdefg")]
    assert list(colours(rows).values()) == ["model", *(f"other{i}" for i in range(6)), "other0"]


@pytest.mark.parametrize("values", [[10.0], [10.0, 10.0], [10.0, 12.0], [0.01, 900.0], [0.5, 4.0]])
def test_axes_hold_all_values_and_have_ticks(values):
    for axis in (latency_axis(values), accuracy_axis([min(v, 100) for v in values])):
        assert axis.low < axis.high
        assert len(axis.ticks) >= 2
        assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
    assert latency_axis(values).log == (max(values) > 5 * min(values))
    assert all(0 < latency_axis(values).at(value) < 1 for value in values)
    assert accuracy_axis([0.0, 0.0]).at(0.0) == 0.0


@pytest.mark.parametrize("count", [1, 3, 40])
def test_labels_do_not_overlap(count):
    found = plane(*((10 + i % 7, 20 + i) for i in range(count)))
    spots = [(60 * (p.x - 9), 10 * (p.y - 19)) for p in found]
    labels = place_labels(found, spots, (480, 420), letter=6, line=14, radius=5)
    assert labels
    boxes = [(x.x, x.y, x.x + x.width, x.y + x.height) for x in labels]
    boxes += [(x - 5, y - 5, x + 5, y + 5) for x, y in spots[:1]]
    for (a, b, c, d), (e, f, g, h) in itertools.combinations(boxes, 2):
        assert c <= e or g <= a or d <= f or h <= b
    assert all(a >= 0 and b >= 0 and c <= 480 and d <= 420 for a, b, c, d in boxes[: len(labels)])


def test_a_label_keeps_off_the_line():
    found = plane((10, 40), (20, 30))
    across = [[(0.0, 80.0), (200.0, 80.0)]]
    (above,) = place_labels(found[:1], [(100, 100)], (200, 200), letter=5, line=10, radius=5)
    (below,) = place_labels(found[:1], [(100, 100)], (200, 200), across, letter=5, line=10, radius=5)
    assert above.y < 100 < below.y


@pytest.mark.parametrize("slow", [10.0, 400.0])
@pytest.mark.parametrize("ap", [0.0, 30.0])
def test_picture_of_any_spread(tmp_path, slow, ap):
    rows = (make_row("model", ap), make_row("baseline", 30.0, 10.2), make_row("teacher", 50.0, slow))
    write_png(BenchmarkReport(rows), tmp_path / "a.png")
    write_png(BenchmarkReport((make_row("model", failed="x"),)), tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size > (tmp_path / "b.png").stat().st_size > 1000


@pytest.mark.parametrize("rows", [(), (make_row("model"),), make_matrix()])
def test_picture_of_any_number_of_rows(tmp_path, rows):
    write_png(BenchmarkReport(rows, {"summary": "$head_$ with <signs>"}), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (1260, 750)


def test_names_are_no_formulas(tmp_path):
    rows = (make_row("other", label="$\\frac{a$"), make_row("other", 20.0, 30.0, label="a_$b$_%"))
    write_png(BenchmarkReport(rows), tmp_path / "a.png")


def test_failed_rows_are_named():
    rows = tuple(make_row("model", failed="x", batch=batch) for batch in (1, 2, 3, 4, 5))
    assert left_out(rows[:1]) == "Failed, and so left out: distilled retina_nano (fp32, CPU, batch 1, 256x320)."
    assert left_out(rows).endswith(" and 2 more.")
    assert left_out((make_row("model"),)) == ""
