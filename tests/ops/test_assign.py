import pytest
import torch
from reference.assign import naive_match
from reference.boxes import random_boxes
from reference.retinanet import torchvision_matches

from gid_yolo.distill.fine_grained import imitation_mask
from gid_yolo.ops.anchors import cell_anchors, grid_anchors
from gid_yolo.ops.assign import BACKGROUND, IGNORED, match_anchors, positive_mask
from gid_yolo.ops.structures import Targets


def make_anchors() -> torch.Tensor:
    cells = torch.stack([cell_anchors([s * 2, s * 3], (0.5, 1.0, 2.0)) for s in (8, 16, 32)])
    return grid_anchors(cells, [torch.zeros(1, 1, 96 // s, 128 // s) for s in (8, 16, 32)], (8, 16, 32))


def pad(images: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    most = max(map(len, images))
    boxes, valid = torch.zeros(len(images), most, 4), torch.zeros(len(images), most, dtype=torch.bool)
    for b, image in enumerate(images):
        boxes[b, : len(image)], valid[b, : len(image)] = image, True
    return boxes, valid


@pytest.mark.parametrize("seed", range(10))
def test_equals_torchvision(seed: int) -> None:
    torch.manual_seed(seed)
    anchors = make_anchors()
    counts = [0, 1, 7, 20]
    images = [random_boxes((n,), image=(96.0, 128.0), smallest=4.0, largest=90.0) for n in counts]
    matched = match_anchors(anchors, *pad(images))
    for row, boxes in zip(matched, images, strict=True):
        assert torch.equal(row, torchvision_matches(anchors, boxes))
    assert {BACKGROUND, IGNORED} < set(matched.unique().tolist())  # the batch has all three kinds


@pytest.mark.parametrize("low_quality", [True, False])
@pytest.mark.parametrize(("high", "low"), [(0.5, 0.4), (0.6, 0.3), (0.5, 0.5)])
def test_equals_the_loop(low_quality: bool, high: float, low: float) -> None:
    anchors = make_anchors()
    images = [random_boxes((n,), image=(96.0, 128.0), smallest=4.0, largest=90.0) for n in (3, 0, 6)]
    matched = match_anchors(anchors, *pad(images), positive_iou=high, negative_iou=low, low_quality=low_quality)
    for row, boxes in zip(matched, images, strict=True):
        expected = naive_match(
            anchors.double().tolist(), boxes.double().tolist(), high=high, low=low, low_quality=low_quality
        )
        assert row.tolist() == expected


def test_best_anchors_of_a_poor_fit_are_kept_with_ties() -> None:
    anchors = torch.tensor([[0.0, 0, 8, 8], [8, 0, 16, 8], [40, 40, 48, 48]])
    boxes, valid = pad([torch.tensor([[4.0, 0, 12, 32]])])  # IoU 32 / (64 + 256 - 32) = 1/9 with the first two
    assert match_anchors(anchors, boxes, valid).tolist() == [[0, 0, BACKGROUND]]
    assert match_anchors(anchors, boxes, valid, low_quality=False).tolist() == [[BACKGROUND] * 3]
    assert naive_match(anchors.tolist(), boxes[0].tolist()) == [0, 0, BACKGROUND]


def test_low_quality_anchor_goes_to_its_own_best_box() -> None:
    # The first anchor is the best one of box 0 (IoU 10 / 100), yet it overlaps box 1 more (IoU 50 / 250); the best
    # anchor of box 1 is the second one (IoU 150 / 200).
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 10, 10, 25]])
    boxes, valid = pad([torch.tensor([[0.0, 0, 10, 1], [0, 5, 10, 25]])])
    assert match_anchors(anchors, boxes, valid).tolist() == [[1, 1]]
    assert naive_match(anchors.tolist(), boxes[0].tolist()) == [1, 1]
    assert match_anchors(anchors, boxes[:, :1], valid[:, :1]).tolist() == [[0, BACKGROUND]]


def test_thresholds_are_inclusive() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10]] * 3)
    for height, expected in [(5.0, 0), (4.9, IGNORED), (4.0, IGNORED), (3.9, BACKGROUND)]:
        boxes, valid = pad([torch.tensor([[0.0, 0, 10, height]])])  # IoU height / 10
        assert match_anchors(anchors, boxes, valid, low_quality=False).tolist() == [[expected] * 3]


def test_a_box_that_touches_no_anchor_gets_none() -> None:
    # The documented exception: torchvision makes every anchor of the image positive here.
    anchors = make_anchors()
    far = torch.tensor([[5000.0, 5000, 5010, 5010]])
    assert (torchvision_matches(anchors, far) == 0).all()
    boxes, valid = pad([far])
    assert (match_anchors(anchors, boxes, valid) == BACKGROUND).all()


def test_boxes_without_area_get_no_anchor() -> None:
    anchors = torch.cat([make_anchors(), torch.tensor([[20.0, 20, 20, 20]])])  # even an empty anchor on an empty box
    boxes, valid = pad([torch.tensor([[20.0, 20, 20, 20]])])
    assert (match_anchors(anchors, boxes, valid) == BACKGROUND).all()


def test_no_box_in_the_batch() -> None:
    anchors = make_anchors()
    matched = match_anchors(anchors, torch.zeros(3, 0, 4), torch.zeros(3, 0, dtype=torch.bool))
    assert matched.shape == (3, len(anchors))
    assert matched.dtype == torch.long
    assert (matched == BACKGROUND).all()


@pytest.mark.parametrize("size", [1, 300, 10**9])
@pytest.mark.parametrize("low_quality", [False, True])
def test_blocks_of_boxes_change_nothing(monkeypatch: pytest.MonkeyPatch, low_quality: bool, size: int) -> None:
    anchors, boxes, valid = random_boxes((150,)), random_boxes((2, 7)), torch.rand(2, 7) < 0.7
    boxes[:, 3] = boxes[:, 2]  # of equals the first, of whatever block
    targets = Targets(boxes, torch.zeros(2, 7, dtype=torch.long), valid)
    expected = match_anchors(anchors, boxes, valid, low_quality=low_quality), imitation_mask(anchors, targets, 50)
    monkeypatch.setattr("gid_yolo.ops.blocks.BLOCK", size)
    assert torch.equal(match_anchors(anchors, boxes, valid, low_quality=low_quality), expected[0])
    assert torch.equal(imitation_mask(anchors, targets, 50), expected[1])
    assert (expected[0] >= 0).any()
    assert expected[1].any()


def test_padding_changes_nothing() -> None:
    anchors = make_anchors()
    boxes, valid = pad([random_boxes((5,), image=(96.0, 128.0))])
    expected = match_anchors(anchors, boxes, valid)
    # Even where the padded slot holds a perfect box, and where the padding comes first
    more = torch.cat([boxes, anchors[None, :4]], dim=1), torch.cat([valid, torch.zeros(1, 4, dtype=torch.bool)], dim=1)
    assert torch.equal(match_anchors(anchors, *more), expected)
    before = torch.cat([anchors[None, :4], boxes], dim=1), torch.cat([~valid[:, :4], valid], dim=1)
    assert torch.equal(match_anchors(anchors, *before), expected + 4 * (expected >= 0))


def test_positive_mask_is_one_sided() -> None:
    anchors = make_anchors()
    images = [random_boxes((n,), image=(96.0, 128.0), smallest=4.0, largest=90.0) for n in (0, 4, 10)]
    mask = positive_mask(anchors, *pad(images))
    for row, boxes in zip(mask, images, strict=True):
        assert torch.equal(row, torchvision_matches(anchors, boxes) >= 0)
    strict = positive_mask(anchors, *pad(images), low_quality=False)
    expected = [
        [m >= 0 for m in naive_match(anchors.tolist(), boxes.double().tolist(), low_quality=False)] for boxes in images
    ]
    assert strict.tolist() == expected
