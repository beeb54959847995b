"""mAP of resampled images against pycocotools, on data sets in which images really are repeated."""

import numpy as np
import pytest
from coco_helpers import evaluate_plainly

from gid_yolo.engine import resample
from gid_yolo.engine.coco_eval import CocoAccumulator
from gid_yolo.engine.matches import write_matches
from gid_yolo.engine.resample import LEAST, OverImages, Resampled, mean_ap, over_images, resampled, resampled_run

CLASSES = 4
NOTHING = np.zeros((0, 4)), np.zeros(0, int)


def images_of(seed, count, detections=30, distinct=False):
    """Objects of some classes, in some images none; scores are equal to other images' unless `distinct`."""
    rng = np.random.default_rng(seed)
    scores = rng.permutation(count * 200) / 2**20 if distinct else None
    for i in range(count):
        m, n = int(rng.integers(0, 7)), int(rng.integers(0, detections + 1))
        corner = rng.uniform(0, 200, (m, 2))
        truth = np.concatenate([corner, corner + rng.uniform(10, 150, (m, 2))], axis=1)
        labels = rng.integers(0, CLASSES - 1, m)  # of the last class there are only detections
        of = rng.integers(0, m, n) if m else np.zeros(0, int)
        found = truth[of] + rng.normal(0, 8, (len(of), 4))
        found[::9, 2:] = found[::9, :2] - 5  # a box turned inside out in one direction, of negative area
        found[::9, 3] += 20
        found_labels = np.where(rng.random(len(of)) < 0.8, labels[of], CLASSES - 1)
        own = scores[200 * i : 200 * i + len(of)] if distinct else rng.permutation(200)[: len(of)] / 200
        yield truth, labels, found, own, found_labels


def matches_of(images, names=None):
    accumulator = CocoAccumulator(CLASSES)
    for i, image in enumerate(images):
        accumulator.add(*image, name=names[i] if names else f"{i:03}.png")
    return accumulator


def literally(images, weights):
    """pycocotools' mAP in percent of a data set in which each image stands as often as its weight says."""
    stats = evaluate_plainly([x for x, k in zip(images, weights, strict=True) for _ in range(k)], CLASSES).stats
    return 100 * stats[0] if stats[0] >= 0 else np.nan


@pytest.mark.parametrize("block", [1, 2**23])
@pytest.mark.parametrize(
    ("seed", "count", "detections"), [(0, 12, 30), (1, 5, 150), (2, 40, 10), (3, 1, 30), (4, 9, 0)]
)
def test_weights_are_repeated_images(monkeypatch, block, seed, count, detections):
    monkeypatch.setattr(resample, "_BLOCK", block)
    images = list(images_of(seed, count, detections))
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), 6)
    expected = [literally(images, row) for row in weights]
    assert mean_ap(matches_of(images).matches(), weights) == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert detections == 0 or np.nanmax(expected) > 1  # there was something to compare


def test_a_class_that_is_not_drawn_is_left_out_and_nothing_at_all_is_unknown():
    box, other = np.array([[10.0, 10, 60, 60]]), np.array([[100.0, 100, 160, 160]])
    first = (box, np.array([0]), box, np.array([0.9]), np.array([0]))
    second = (box, np.array([1]), other, np.array([0.8]), np.array([1]))
    images = [first, second, (*NOTHING, other, np.array([0.7]), np.array([0]))]
    weights = np.array([[1, 1, 1], [3, 0, 0], [0, 3, 0], [0, 0, 3], [1, 0, 2]])
    found = mean_ap(matches_of(images).matches(), weights)
    # class 0 is found, class 1 is not; where neither has an object there is no mAP
    assert found == pytest.approx([50, 100, 0, np.nan, 100], nan_ok=True)
    assert found == pytest.approx([literally(images, row) for row in weights], abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("seed", range(4))
def test_every_image_once_is_the_column(seed):
    accumulator = matches_of(list(images_of(seed, 30)))
    (found,) = mean_ap(accumulator.matches(), np.ones((1, 30), int))
    assert round(float(found), 4) == accumulator.columns()["mAP"]


def test_the_draws_are_of_the_names_in_their_order():
    images = list(images_of(5, 10, distinct=True))
    names = [f"{i}.png" for i in (3, 1, 4, 0, 5, 9, 2, 6, 8, 7)]
    one = resampled(matches_of(images, names).matches(), 20)
    order = np.random.default_rng(1).permutation(10)
    other = resampled(matches_of([images[i] for i in order], [names[i] for i in order]).matches(), 20)
    assert one.images == other.images == tuple(f"{i}.png" for i in range(10))
    assert one.maps == pytest.approx(other.maps, abs=1e-9, nan_ok=True)
    draws = np.random.default_rng(0).multinomial(10, np.full(10, 0.1), 20)
    by_name = [images[names.index(name)] for name in one.images]
    assert one.maps[:3] == pytest.approx([literally(by_name, row) for row in draws[:3]], abs=1e-9)
    assert np.nanstd(one.maps) > 1  # they are draws


def test_the_interval_is_that_of_the_mean_over_seeds():
    images, steps = ("a", "b", "c"), np.arange(101.0)  # whose 2.5 and 97.5 percentiles are 2.5 and 97.5
    plain = {0: Resampled(images, np.full(101, 20.0)), 1: Resampled(images, np.full(101, 30.0))}
    runs = {0: Resampled(images, 20 + 2 * steps), 1: Resampled(images, np.full(101, 30.0)), 2: plain[0]}
    found = over_images(runs, plain, {0, 1})
    assert (found.low, found.high, found.count) == (pytest.approx(2.5), pytest.approx(97.5), 3)
    assert not found.certain  # of three images
    assert OverImages(0.1, 5.0, LEAST).certain
    assert OverImages(-5.0, -0.1, LEAST).certain
    assert not OverImages(0.1, 5.0, LEAST - 1).certain
    assert not OverImages(-0.1, 5.0, LEAST).certain
    found = over_images(runs, plain, {1})
    assert (found.low, found.high, found.certain) == (0, 0, False)
    assert over_images(runs, plain, {0, 2}) is None  # of seed 2 the plain run is not there
    assert over_images(runs, plain, ()) is None


def test_no_interval_of_other_images_or_of_none():
    one, other = Resampled(("a", "b"), np.array([1.0, 2.0])), Resampled(("a", "c"), np.array([1.0, 2.0]))
    assert over_images({0: one}, {0: other}, {0}) is None
    unknown = Resampled(("a", "b"), np.full(2, np.nan))
    assert over_images({0: unknown}, {0: unknown}, {0}) is None
    part = Resampled(("a", "b"), np.array([np.nan, 5.0]))
    assert over_images({0: part}, {0: Resampled(("a", "b"), np.array([np.nan, 2.0]))}, {0}).low == 3


def test_a_file_of_another_evaluation_than_the_results_is_none(tmp_path):
    accumulator = matches_of(list(images_of(0, 12)))
    write_matches(accumulator.matches(), tmp_path / "a.npz")
    measured = accumulator.columns()["mAP"]
    assert len(resampled_run(tmp_path / "a.npz", measured).maps) == 500
    assert resampled_run(tmp_path / "a.npz", measured + 0.1) is None
    assert resampled_run(tmp_path / "b.npz", measured) is None
    write_matches(matches_of([]).matches(), tmp_path / "empty.npz")
    assert resampled_run(tmp_path / "empty.npz", -1) is None
