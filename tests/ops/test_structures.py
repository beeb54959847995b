import math
from dataclasses import replace

import pytest
import torch
from reference.boxes import random_boxes

from gid_yolo.ops.boxes import decode_deltas
from gid_yolo.ops.structures import RawPredictions, Targets


def naive_padding(boxes: torch.Tensor, labels: torch.Tensor, image_index: torch.Tensor, batch_size: int) -> list:
    images: list[list] = [[] for _ in range(batch_size)]
    for box, label, image in zip(boxes.tolist(), labels.tolist(), image_index.tolist(), strict=True):
        images[int(image)].append((box, int(label)))
    return images


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.long, torch.float32])  # Ultralytics' batch_idx and cls are floats
def test_from_flat_pads_unordered_objects(seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    count, batch = 17, 6
    boxes, labels = random_boxes((count,)), torch.randint(0, 9, (count,)).to(dtype)
    image_index = torch.tensor([0, 2, 3, 5])[torch.randint(0, 4, (count,))].to(dtype)  # 1 and 4 have no object
    targets = Targets.from_flat(boxes, labels, image_index, batch)
    expected = naive_padding(boxes, labels, image_index, batch)

    most = max(map(len, expected))
    assert targets.boxes.shape == (batch, most, 4)
    assert targets.labels.dtype == torch.long
    for b, objects in enumerate(expected):
        n = len(objects)
        assert targets.valid[b].tolist() == [True] * n + [False] * (most - n)
        assert targets.boxes[b, :n].tolist() == [box for box, _ in objects]
        assert targets.labels[b, :n].tolist() == [label for _, label in objects]
        assert not targets.boxes[b, n:].any()
        assert not targets.labels[b, n:].any()


def test_from_flat_without_any_object() -> None:
    targets = Targets.from_flat(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), 3)
    assert targets.boxes.shape == (3, 0, 4)
    assert targets.labels.shape == targets.valid.shape == (3, 0)


def test_raw_predictions() -> None:
    anchors = random_boxes((7,))
    raw = RawPredictions(
        torch.randn(2, 7, 3, requires_grad=True), torch.randn(2, 7, 4, requires_grad=True), anchors, decode_deltas
    )
    torch.testing.assert_close(raw.scores, 1 / (1 + (-raw.logits).exp()))
    assert torch.equal(raw.boxes, decode_deltas(raw.regression, anchors))
    assert raw.scores.requires_grad
    detached = raw.detach()
    assert not detached.scores.requires_grad
    assert not detached.boxes.requires_grad
    assert torch.equal(detached.logits, raw.logits)


def test_select_classes_reorders_the_classes_alone() -> None:
    raw = RawPredictions(torch.randn(2, 7, 3), torch.randn(2, 7, 4), random_boxes((7,)), decode_deltas)
    picked = raw.select_classes(torch.tensor([2, 0]))
    for new, old in enumerate((2, 0)):
        assert torch.equal(picked.logits[..., new], raw.logits[..., old])
    assert picked.logits.shape == (2, 7, 2)
    assert picked.regression is raw.regression
    assert raw.select_classes(None) is raw


def test_gather_follows_the_match() -> None:
    targets = Targets(random_boxes((2, 3)), torch.randint(0, 9, (2, 3)), torch.ones(2, 3, dtype=torch.bool))
    matched = torch.tensor([[2, -1, 0, 0], [-2, 1, 1, 2]])
    labels, boxes = targets.gather(matched)
    for b in range(2):
        for r, m in enumerate(matched[b].tolist()):
            if m >= 0:
                assert labels[b, r] == targets.labels[b, m]
                assert torch.equal(boxes[b, r], targets.boxes[b, m])
    assert torch.isfinite(boxes).all()


def test_gather_without_any_object() -> None:
    targets = Targets.from_flat(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), 2)
    labels, boxes = targets.gather(torch.full((2, 5), -1))
    assert labels.shape == (2, 5)
    assert not boxes.any()
    assert boxes.shape == (2, 5, 4)


def test_confidence_is_the_root_of_score_and_centerness() -> None:
    logits, centerness = torch.randn(2, 5, 3), torch.randn(2, 5)
    raw = RawPredictions(logits, torch.zeros(2, 5, 4), torch.zeros(5, 4), decode_deltas)
    assert torch.equal(raw.confidences, raw.scores)
    raw = RawPredictions(logits, torch.zeros(2, 5, 4), torch.zeros(5, 4), decode_deltas, centerness.requires_grad_())
    for b in range(2):
        for r in range(5):
            c = 1 / (1 + math.exp(-centerness[b, r].item()))
            expected = [math.sqrt(c / (1 + math.exp(-x))) for x in logits[b, r].tolist()]
            assert raw.confidences[b, r].tolist() == pytest.approx(expected, rel=1e-5)
            product = replace(raw, sqrt_score=False).detach().confidences[b, r]
            assert product.tolist() == pytest.approx([x * x for x in expected], rel=1e-5)
    assert raw.centerness.requires_grad
    assert not raw.detach().centerness.requires_grad


def test_an_objectness_has_no_classes_to_select() -> None:
    raw = RawPredictions(torch.randn(2, 5, 1), torch.zeros(2, 5, 4), torch.zeros(5, 4), decode_deltas)
    assert raw.select_classes(torch.tensor([7, 3])) is raw
