"""FCOS as mmdetection and the paper have it, against the defaults."""

import copy
import math
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from reference.fcos import naive_response

from gid_yolo.detectors import FCOS, build_detector
from gid_yolo.distill import GIDLoss
from gid_yolo.ops.structures import Targets

CLASSES = 3
SIZE = (96, 160)
THEIRS = {
    "p7_relu": False,
    "point_offset": 0.5,
    "box_coding": "exp",
    "level_scales": True,
    "centerness_from": "cls",
    "sqrt_score": False,
    "center_radius": math.inf,
}


def spread(detector: FCOS) -> FCOS:
    """Weights that make scores, boxes and centre-ness differ between points, as after training."""
    for conv in (detector.head.cls_logits, detector.head.box_ltrb, detector.head.centerness):
        torch.nn.init.normal_(conv.weight, std=0.1)
    torch.nn.init.constant_(detector.head.box_ltrb.bias, 2.0)
    return detector


def test_training_step_reaches_every_parameter() -> None:
    detector = build_detector("fcos_nano", CLASSES, **THEIRS).train()
    features, raw = detector.raw(torch.rand(2, 3, *SIZE))
    boxes = torch.tensor([[[20.0, 16, 60, 70], [90, 30, 150, 60]], [[0.0, 0, 150, 90], [0.0, 0, 0, 0]]])
    targets = Targets(boxes, torch.tensor([[0, 2], [1, 0]]), torch.tensor([[True, True], [True, False]]))
    sum(detector.loss(features, raw, targets, SIZE).values()).backward()
    without = [name for name, p in detector.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert without == []
    assert detector.head.scales.grad[0] != 0


@torch.no_grad()
def test_onnx_equals_torch_with_every_other_setting(tmp_path) -> None:
    detector = spread(build_detector("fcos_nano", CLASSES, **THEIRS).eval())
    torch.nn.init.uniform_(detector.head.scales, 0.5, 1.5)
    images, path = torch.rand(2, 3, *SIZE), tmp_path / "fcos.onnx"
    names = {"input_names": ["images"], "output_names": ["output0"]}
    torch.onnx.export(detector, images, path, opset_version=17, dynamo=False, **names)
    (found,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(
        None, {"images": images.numpy()}
    )
    expected = detector(images).numpy()
    np.testing.assert_allclose(found[:, :4], expected[:, :4], atol=0.01)  # px
    np.testing.assert_allclose(found[:, 4:], expected[:, 4:], atol=1e-5)


def test_a_teacher_of_another_coding_is_compared_by_its_boxes() -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 3, *SIZE)
    student = spread(build_detector("fcos_nano", CLASSES, point_offset=0.5).eval())
    teacher = spread(build_detector("fcos_nano", CLASSES, **THEIRS).eval())
    with torch.no_grad():
        pyramid, theirs = teacher.raw(images)
    features, ours = student.raw(images)
    assert torch.equal(ours.priors, theirs.priors)
    assert ours.priors[0].tolist() == [0.0, 0.0, 8.0, 8.0]
    assert theirs.regression.min() < 0  # logarithms
    gid = GIDLoss(student.fpn_channels, teacher.fpn_channels)
    terms, instances = gid(pyramid, features, theirs, ours, functions=student, strides=student.strides, image_size=SIZE)
    mask = student.response_mask(ours.priors, instances.boxes, instances.valid)
    side = theirs.priors[:, 2:3] - theirs.priors[:, :1]
    in_strides = replace(theirs, regression=theirs.regression.exp() / side)
    expected = naive_response(in_strides, ours, mask, alpha=0.1, beta=1.0)
    assert terms["resp_loss"].item() == pytest.approx(expected, rel=1e-4)
    sum(terms.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_a_checkpoint_that_was_pickled_before_these_settings_has_their_defaults() -> None:
    nano = spread(build_detector("fcos_nano", CLASSES).eval())
    old = copy.deepcopy(nano)
    for name in ("exp_coding", "sqrt_score"):
        del old.__dict__[name]
    for name in ("centerness_on_cls", "relu", "num_scales"):
        del old.head.__dict__[name]
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(old(images), nano(images))
