import pytest
import torch
from reference.boxes import centre_form, random_boxes

from gid_yolo.ops.decode import clip_boxes, dense_detections
from gid_yolo.ops.structures import RawPredictions

HEIGHT, WIDTH = 60, 90


def as_given(regression: torch.Tensor, priors: torch.Tensor) -> torch.Tensor:
    return regression


def make_raw(dtype: torch.dtype = torch.float32) -> RawPredictions:
    boxes = random_boxes((2, 11), image=(HEIGHT, WIDTH), largest=100.0)
    boxes[0, 0] = torch.tensor([200.0, 200, 220, 210])  # right of and below the image
    boxes[0, 1] = torch.tensor([-50.0, -40, -20, -10])  # left of and above it
    return RawPredictions(torch.randn(2, 11, 3).to(dtype), boxes, torch.zeros(11, 4), as_given)


def test_layout_and_clipping_equal_the_loop() -> None:
    raw = make_raw()
    detections = dense_detections(raw, HEIGHT, WIDTH)
    assert detections.shape == (2, 4 + 3, 11)
    for b in range(2):
        for r in range(11):
            x1, y1, x2, y2 = raw.boxes[b, r].tolist()
            box = [min(max(v, 0.0), limit) for v, limit in zip((x1, y1, x2, y2), (WIDTH, HEIGHT) * 2, strict=True)]
            expected = [*centre_form(box), *raw.logits[b, r].double().sigmoid().tolist()]
            assert detections[b, :, r].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_sizes_may_be_tensors() -> None:
    raw = make_raw()
    boxes = clip_boxes(raw.boxes, torch.tensor(HEIGHT), torch.tensor(WIDTH))
    assert torch.equal(boxes, clip_boxes(raw.boxes, HEIGHT, WIDTH))


def test_half_precision_scores_keep_the_boxes_in_fp32() -> None:
    detections = dense_detections(make_raw(torch.float16), HEIGHT, WIDTH)
    assert detections.dtype == torch.float32
