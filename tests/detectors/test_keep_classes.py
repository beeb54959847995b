"""A detector restricted to some of its classes gives them the scores it gave them before."""

from copy import deepcopy

import onnxruntime
import pytest
import torch
from torch import nn

from gid_yolo.detectors import build_detector

INDEX = [3, 0, 4]  # of 5 classes, in another order


def build(name: str, classes: int = 5) -> nn.Module:
    detector = build_detector(name, classes).eval()
    for layer in detector.head.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):  # classes, boxes and backgrounds that differ
            nn.init.normal_(layer.weight, std=0.05)
            nn.init.normal_(layer.bias) if layer.bias is not None else None
    return detector


@pytest.mark.parametrize("name", ["retina_nano", "fcos_nano"])
@torch.no_grad()
def test_a_dense_head_gives_the_same_columns(name: str) -> None:
    detector, images = build(name), torch.rand(2, 3, 64, 96)
    before = detector(images)
    detector.keep_classes(INDEX)
    assert detector.num_classes == 3
    torch.testing.assert_close(detector(images), torch.cat([before[:, :4], before[:, 4:][:, INDEX]], dim=1))


@pytest.mark.parametrize("index", [INDEX, [4, 2, 0, 1, 3]])
@torch.no_grad()
def test_faster_rcnn_keeps_probabilities_and_boxes(index: list[int]) -> None:
    detector, images = build("frcnn_nano"), torch.rand(2, 3, 64, 96)
    features, raw = detector.raw(images)
    boxes, _ = detector.proposals(features, raw, 64, 96)
    logits, deltas = detector.classify(features, boxes)
    detector.keep_classes(index)
    found_logits, found_deltas = detector.classify(features, boxes)
    # The softmax over all classes; the rest of it is the background's
    expected = logits.softmax(-1)[..., index]
    torch.testing.assert_close(found_logits.softmax(-1)[..., :-1], expected)
    torch.testing.assert_close(found_logits.softmax(-1)[..., -1], 1 - expected.sum(-1))
    torch.testing.assert_close(found_deltas, deltas[:, :, index])


@torch.no_grad()
def test_faster_rcnn_finds_what_it_found_of_the_classes(tmp_path) -> None:
    detector, images = build("frcnn_nano"), torch.rand(1, 3, 64, 96)
    detector.max_det = 2000  # all, so that dropped classes make no room
    rows = detector(images)[0]
    expected = torch.cat(
        [torch.cat([rows[:, :5], torch.full((len(rows), 1), i)], 1)[rows[:, 5] == old] for i, old in enumerate(INDEX)]
    )
    expected = expected[expected[:, 4] > 0]
    detector.keep_classes(INDEX)
    found = detector(images)[0]
    found = found[found[:, 4] > 0]
    assert len(found) == len(expected) > 3
    order = expected[:, 4].argsort(descending=True, stable=True)
    torch.testing.assert_close(found, expected[order], rtol=1e-4, atol=1e-3)

    path = tmp_path / "a.onnx"
    torch.onnx.export(detector, (images,), path, dynamo=False, opset_version=17)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    rows = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0][0])
    torch.testing.assert_close(rows[rows[:, 4] > 0], found, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("name", ["retina_nano", "fcos_nano", "frcnn_nano"])
@torch.no_grad()
def test_classes_that_are_kept_twice(name: str) -> None:
    once, images = build(name), torch.rand(2, 3, 64, 96)
    twice = deepcopy(once)
    once.keep_classes([4, 3])
    twice.keep_classes(INDEX)
    twice.keep_classes([2, 0])
    assert twice.num_classes == 2
    assert twice.other_classes == once.other_classes
    torch.testing.assert_close(twice(images), once(images))
