"""The ten columns against pycocotools' own JSON interface, and the validator that fills them."""

import json
import multiprocessing
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from coco_helpers import crowded_images, evaluate_plainly
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gid_yolo.engine import coco_eval
from gid_yolo.engine.coco_eval import COLUMNS, CocoAccumulator, format_row


def random_images(rng, images=12, classes=3):
    """Ground truth of all three size ranges, and detections that are near it, doubled, missing or made up."""
    for _ in range(images):
        count = int(rng.integers(0, 6))
        corner = rng.uniform(0, 200, (count, 2))
        truth = np.concatenate([corner, corner + np.exp(rng.uniform(np.log(10), np.log(250), (count, 2)))], axis=1)
        labels = rng.integers(0, classes, count)
        found = np.concatenate(
            [truth + rng.normal(0, 6, truth.shape), truth[:2] + rng.normal(0, 30, (min(count, 2), 4))]
        )
        found = np.concatenate([found[:, :2], np.maximum(found[:, 2:], found[:, :2] + 1)], axis=1)
        found_labels = np.concatenate([labels, labels[:2]])
        yield truth, labels, found, rng.uniform(0, 1, len(found)), found_labels


def test_columns_equal_pycocotools_on_the_same_json(tmp_path):
    accumulator, images, annotations, detections = CocoAccumulator(3), [], [], []
    for i, (truth, labels, found, scores, found_labels) in enumerate(random_images(np.random.default_rng(3)), 1):
        accumulator.add(truth, labels, found, scores, found_labels)
        images.append({"id": i})
        for (x1, y1, x2, y2), c in zip(truth.tolist(), labels.tolist(), strict=True):
            box = [x1, y1, x2 - x1, y2 - y1]
            area = box[2] * box[3]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": i, "category_id": c, "bbox": box, "area": area, "iscrowd": 0}
            )
        for (x1, y1, x2, y2), s, c in zip(found.tolist(), scores.tolist(), found_labels.tolist(), strict=True):
            detections.append({"image_id": i, "category_id": c, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": s})
    categories = [{"id": c, "name": str(c)} for c in range(3)]
    (tmp_path / "truth.json").write_text(
        json.dumps({"info": {}, "images": images, "annotations": annotations, "categories": categories})
    )
    (tmp_path / "found.json").write_text(json.dumps(detections))
    truth = COCO(str(tmp_path / "truth.json"))
    evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "found.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    s = evaluation.stats  # AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl
    expected = [s[0], s[1], s[2], s[3], s[4], s[5], s[8], s[9], s[10], s[11]]
    assert list(accumulator.columns().values()) == pytest.approx([100 * v for v in expected], abs=1e-3)
    assert len({round(v, 6) for v in expected}) == len(COLUMNS)  # so that a mixed-up column would show


def plain_columns(images, classes):
    """pycocotools over all images at once, through its own interface."""
    stats = evaluate_plainly(images, classes).stats
    return [round(100 * s, 4) if s >= 0 else -1 for s in stats[[0, 1, 2, 3, 4, 5, 8, 9, 10, 11]].tolist()]


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize(("seed", "detections"), [(0, 20), (1, 40), (2, 0), (3, 300)])
def test_what_a_process_evaluates_beside_is_pycocotools(monkeypatch, chunk, seed, detections):
    monkeypatch.setattr(coco_eval, "CHUNK", chunk)
    images = list(crowded_images(np.random.default_rng(seed), 14, 3, 8, detections))
    images.append((np.array([[0.0, 0, 40, 40]]), np.array([0]), np.zeros((0, 4)), np.zeros(0), np.zeros(0)))
    accumulator = CocoAccumulator(4, beside=True)  # of the last class there is nothing
    for image in images:
        accumulator.add(*image)
    assert list(accumulator.columns().values()) == plain_columns(images, 4)
    assert accumulator.count == 15


def test_accumulators_of_two_processes_merge_to_that_of_one():
    images = list(random_images(np.random.default_rng(5)))
    first, second = CocoAccumulator(3), CocoAccumulator(3)
    for i, image in enumerate(images):
        (first if i < 5 else second).add(*image)
    merged = CocoAccumulator.merged([first, second])
    assert merged.count == len(images)
    assert list(merged.columns().values()) == plain_columns(images, 3)


def test_perfect_detections_and_absent_sizes():
    accumulator = CocoAccumulator(2)
    box = np.array([[10.0, 10, 60, 60]])  # 2500 px², medium
    accumulator.add(box, np.array([0]), box, np.array([0.9]), np.array([0]))
    columns = accumulator.columns()
    assert columns["mAP"] == columns["AP_M"] == columns["mAR"] == 100
    assert columns["AP_S"] == columns["AP_L"] == -1
    assert format_row(columns, "val").splitlines()[1].split()[4] == "-"


def test_no_detections_and_no_objects():
    accumulator = CocoAccumulator(1)
    empty = np.zeros((0, 4)), np.zeros(0), np.zeros(0)
    accumulator.add(np.array([[10.0, 10, 60, 60]]), np.array([0]), *empty)
    assert accumulator.columns()["mAP"] == 0
    nothing = CocoAccumulator(1)
    nothing.add(np.zeros((0, 4)), np.zeros(0), *empty)
    assert nothing.columns()["mAP"] == -1


@pytest.mark.parametrize("after", [3, 9])  # images: of chunks of 3, while the first is evaluated, or the third
def test_a_process_that_is_killed_costs_a_warning_and_no_number(monkeypatch, after):
    lines = []
    monkeypatch.setattr(coco_eval.LOGGER, "warning", lines.append)
    monkeypatch.setattr(coco_eval, "CHUNK", 3)
    images = list(crowded_images(np.random.default_rng(0), 14, 3, 8, 20))
    accumulator = CocoAccumulator(3, beside=True)
    for count, image in enumerate(images, 1):
        accumulator.add(*image)
        if count == after:
            for process in accumulator._pool._processes.values():
                process.kill()
                process.join()
    assert list(accumulator.columns().values()) == plain_columns(images, 3)
    assert len(lines) == 1
    assert "was ended from outside" in lines[0]


def test_a_process_that_cannot_be_started_costs_a_warning_and_no_number(monkeypatch):
    lines = []
    monkeypatch.setattr(coco_eval.LOGGER, "warning", lines.append)
    monkeypatch.setattr(coco_eval, "CHUNK", 3)

    def no_memory(*_):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("os.fork", no_memory)
    images = list(crowded_images(np.random.default_rng(0), 14, 3, 8, 20))
    accumulator = CocoAccumulator(3, beside=True)
    for image in images:
        accumulator.add(*image)
    assert list(accumulator.columns().values()) == plain_columns(images, 3)
    assert len(lines) == 1
    assert "could not be started" in lines[0]


def test_a_process_of_a_pool_evaluates_by_itself():
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(beside_in_a_pool) is False


def beside_in_a_pool():
    return CocoAccumulator(3, beside=True).beside


def test_the_process_beside_ends_with_a_parent_that_is_killed(tmp_path):
    script = f"""
import time, numpy as np
from gid_yolo.engine import coco_eval
coco_eval.CHUNK = 1
accumulator = coco_eval.CocoAccumulator(3, beside=True)
accumulator.add(np.zeros((0, 4)), np.zeros(0), np.zeros((0, 4)), np.zeros(0), np.zeros(0))
accumulator._chunks[0][1].result()
with open({str(tmp_path / "pid")!r}, "w") as file:
    file.write(str(*accumulator._pool._processes))
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", script])
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert parent.poll() is None
        time.sleep(0.1)
    child = psutil.Process(int((tmp_path / "pid").read_text()))
    parent.kill()
    parent.wait()
    child.wait(timeout=30)  # raises where it lives on


def test_what_was_evaluated_beside_cannot_be_merged(monkeypatch):
    monkeypatch.setattr(coco_eval, "CHUNK", 3)
    part = CocoAccumulator(3, beside=True)
    for image in random_images(np.random.default_rng(5), 4):
        part.add(*image)
    with pytest.raises(ValueError, match="cannot be merged"):
        CocoAccumulator.merged([part])
