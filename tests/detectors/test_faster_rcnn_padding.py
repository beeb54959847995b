"""Padding among the proposals of Faster R-CNN costs nothing and finds nothing."""

import pytest
import torch
from reference.boxes import random_boxes

from gid_yolo.detectors import FasterRCNN, build_detector

SIZE = (96, 160)


@pytest.fixture(scope="module")
def nano() -> FasterRCNN:
    torch.manual_seed(0)
    return build_detector("frcnn_nano", 3).eval()


@torch.no_grad()
def test_boxes_that_are_none_are_not_classified(nano: FasterRCNN) -> None:
    features, _ = nano.raw(torch.rand(2, 3, *SIZE))
    boxes, valid = random_boxes((2, 20), image=SIZE, smallest=8.0, largest=90.0), torch.rand(2, 20) < 0.5
    for found, every in zip(nano.classify(features, boxes, valid), nano.classify(features, boxes), strict=True):
        torch.testing.assert_close(found[valid], every[valid])
        assert not found[~valid].any()


def test_an_image_without_proposals(nano: FasterRCNN, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nano, "rpn_min_score", 1.1)
    with torch.no_grad():
        assert not nano(torch.rand(2, 3, *SIZE)).any()
