"""Letterbox, NMS and scaling against Ultralytics', to the last bit."""

import numpy as np
import pytest
import torch
from runtime_helpers import picture
from torchvision.ops import nms as torchvision_nms
from ultralytics.data.augment import LetterBox
from ultralytics.utils import ops
from ultralytics.utils.nms import non_max_suppression

import gid_yolo.export.postprocess as postprocess
from gid_yolo.export.postprocess import from_dense, from_final, nms, scale_boxes
from gid_yolo.export.preprocess import fit, letterbox, to_input

SIZES = [(64, 96), (96, 64), (128, 128), (160, 96)]


def shapes(count=60, seed=0):
    rng = np.random.default_rng(seed)
    return [(1, 1), (1, 300), (300, 1), (64, 96), *rng.integers(1, 400, (count, 2)).tolist()]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stride", [None, 32, 64])
def test_letterbox(size, stride):
    for i, shape in enumerate(shapes()):
        image = picture(*shape, seed=i)
        place = fit(shape, size, stride)
        expected = LetterBox(size, auto=stride is not None, stride=stride or 32)(image=image)
        found = letterbox(image, place)
        assert found.shape[:2] == place.size
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_input(dtype):
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    images = [picture(16, 16), every]
    tensor = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).flip(1)
    expected = (tensor.half() if dtype == np.float16 else tensor.float()).div_(255)
    found = to_input(images, dtype)
    assert found.dtype == dtype
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, expected.numpy())


def candidates(count, seed, classes=5, extent=200.0):
    """(4 + C, R): crowded boxes, with equal scores among them and some that are empty."""
    rng = np.random.default_rng(seed)
    boxes = np.stack([rng.uniform(0, extent, count), rng.uniform(0, extent, count), *rng.uniform(0, 60, (2, count))])
    boxes[2:, rng.random(count) < 0.05] = 0
    boxes[:, 1::7] = boxes[:, : len(boxes[0, 1::7])]  # some twice
    scores = rng.random((classes, count)).round(2)
    return np.concatenate([boxes, scores]).astype(np.float32)


@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 700, 3000])
@pytest.mark.parametrize("iou", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_nms_is_torchvisions(count, iou):
    output = candidates(count, seed=count)
    boxes = ops.xywh2xyxy(output[:4].T)
    scores = output[4]
    expected = torchvision_nms(torch.from_numpy(boxes), torch.from_numpy(scores), iou).numpy()
    np.testing.assert_array_equal(nms(boxes, scores, iou), expected)
    np.testing.assert_array_equal(nms(boxes, scores, iou, 10), expected[:10])


@pytest.mark.parametrize("conf", [0.0, 0.25, 0.9, 1.0])
@pytest.mark.parametrize("classes", [1, 2, 80])
def test_dense_outputs(conf, classes):
    for seed in range(4):
        output = candidates(400, seed, classes)
        expected = non_max_suppression(torch.from_numpy(output[None].copy()), conf, 0.5, max_det=50)[0]
        np.testing.assert_array_equal(from_dense(output, conf=conf, iou=0.5, max_det=50), expected.numpy())


def test_only_so_many_candidates(monkeypatch):
    monkeypatch.setattr(postprocess, "MAX_CANDIDATES", 37)
    output = candidates(300, 0)
    output[4:] = np.random.default_rng(1).permutation(1500).reshape(5, 300) / np.float32(1500)  # no two alike
    expected = non_max_suppression(torch.from_numpy(output[None].copy()), 0.1, 0.5, max_nms=37)[0]
    np.testing.assert_array_equal(from_dense(output, conf=0.1, iou=0.5, max_det=300), expected.numpy())


def test_the_constants_are_theirs():
    defaults = dict(zip(non_max_suppression.__code__.co_varnames[1:], non_max_suppression.__defaults__, strict=False))
    assert (defaults["max_nms"], defaults["max_wh"]) == (postprocess.MAX_CANDIDATES, postprocess.CLASS_OFFSET)


def test_final_outputs():
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.uniform(0, 99, (40, 4)), rng.random((40, 1)), rng.integers(0, 3, (40, 1))], 1)
    rows = rows[np.argsort(-rows[:, 4])].astype(np.float32)
    rows[30:] = 0
    expected = non_max_suppression(torch.from_numpy(rows[None]), 0.3, end2end=True, max_det=12)[0].numpy()
    np.testing.assert_array_equal(from_final(rows, conf=0.3, max_det=12), expected)
    assert from_final(rows[::-1], conf=0.3, max_det=40)[0, 4] == rows[0, 4]  # sorted


@pytest.mark.parametrize("size", SIZES)
def test_boxes_back_in_the_image(size):
    rng = np.random.default_rng(0)
    for shape in shapes():
        for stride in (None, 32):
            outer = fit(shape, size, stride).size
            boxes = rng.uniform(-20, 180, (30, 4)).astype(np.float32)
            expected = ops.scale_boxes(outer, torch.from_numpy(boxes.copy()), shape).numpy()
            np.testing.assert_array_equal(scale_boxes(boxes, outer, shape), expected)
