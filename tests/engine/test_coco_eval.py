"""The ten columns against pycocotools' own JSON interface, and the validator that fills them."""

import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

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
    accumulator, images, annotations, detections = CocoAccumulator(), [], [], []
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
    assert list(accumulator.columns(3).values()) == pytest.approx([100 * v for v in expected], abs=1e-3)
    assert len({round(v, 6) for v in expected}) == len(COLUMNS)  # so that a mixed-up column would show


def test_accumulators_of_two_processes_merge_to_that_of_one():
    images = list(random_images(np.random.default_rng(5)))
    one, first, second = CocoAccumulator(), CocoAccumulator(), CocoAccumulator()
    for i, image in enumerate(images):
        one.add(*image)
        (first if i < 5 else second).add(*image)
    assert CocoAccumulator.merged([first, second]) == one


def test_perfect_detections_and_absent_sizes():
    accumulator = CocoAccumulator()
    box = np.array([[10.0, 10, 60, 60]])  # 2500 px², medium
    accumulator.add(box, np.array([0]), box, np.array([0.9]), np.array([0]))
    columns = accumulator.columns(2)
    assert columns["mAP"] == columns["AP_M"] == columns["mAR"] == 100
    assert columns["AP_S"] == columns["AP_L"] == -1
    assert format_row(columns, "val").splitlines()[1].split()[4] == "-"


def test_no_detections_and_no_objects():
    accumulator = CocoAccumulator()
    empty = np.zeros((0, 4)), np.zeros(0), np.zeros(0)
    accumulator.add(np.array([[10.0, 10, 60, 60]]), np.array([0]), *empty)
    assert accumulator.columns(1)["mAP"] == 0
    nothing = CocoAccumulator()
    nothing.add(np.zeros((0, 4)), np.zeros(0), *empty)
    assert nothing.columns(1)["mAP"] == -1
