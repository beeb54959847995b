"""Images with objects and detections, as arrays, and pycocotools through its own interface."""

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def crowded_images(rng, images, classes, objects, detections):
    """Corners, sizes and scores of few values, so that overlaps, areas and scores are often equal to others'."""

    def boxes(count):
        corner = rng.integers(0, 12, (count, 2)) * 8
        size = rng.choice([0, 8, 16, 24, 32, 64, 96, 128], (count, 2), p=[0.02, *[0.14] * 7])
        return np.concatenate([corner, corner + size], axis=1).astype(np.float32)

    for _ in range(images):
        m, n = int(rng.integers(0, objects + 1)), int(rng.integers(0, detections + 1))
        truth, found = boxes(m), boxes(n)
        near = rng.random(n) < 0.7 if m else np.zeros(n, bool)
        of = rng.integers(0, max(m, 1), n)[near]
        found[near] = truth[of] + rng.integers(-1, 2, (near.sum(), 4)) * 4
        labels, found_labels = rng.integers(0, classes, m), rng.integers(0, classes, n)
        found_labels[near] = labels[of]
        yield truth, labels, found, rng.integers(1, 20, n).astype(np.float32) / 20, found_labels


def evaluate_plainly(images, classes):
    numbers, objects, detections = [], [], []
    for i, (true_boxes, true_classes, boxes, scores, found_classes) in enumerate(images, 1):
        numbers.append({"id": i})
        for (x1, y1, x2, y2), c in zip(true_boxes.astype(float).tolist(), true_classes.tolist(), strict=True):
            row = {"id": len(objects) + 1, "image_id": i, "category_id": int(c), "iscrowd": 0}
            objects.append({**row, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)})
        found = zip(boxes.astype(float).tolist(), scores.tolist(), found_classes.tolist(), strict=True)
        for (x1, y1, x2, y2), s, c in found:
            row = {"image_id": i, "category_id": int(c), "score": s}
            detections.append({**row, "bbox": [x1, y1, x2 - x1, y2 - y1]})
    truth = COCO()
    truth.dataset = {"info": {}, "images": numbers, "annotations": objects}
    truth.dataset["categories"] = [{"id": c, "name": str(c)} for c in range(classes)]
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(detections) if detections else COCO(), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation
