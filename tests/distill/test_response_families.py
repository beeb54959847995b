"""Equations 7 and 8 in the edge cases, for every kind of detector."""

import pytest
import torch
from reference.boxes import random_boxes
from reference.yolo import naive_ciou, naive_response
from response_helpers import FAMILIES, SIZE, R, functions_of, leaves, make_priors, make_raw, with_leaves
from torch import Tensor
from ultralytics.utils.metrics import bbox_iou

from gid_yolo.distill import response_loss
from gid_yolo.ops.dfl import decode_dfl
from gid_yolo.ops.structures import RawPredictions

GOOD = [16.0, 16.0, 48.0, 56.0]  # over several points and anchors
NOWHERE = [
    [1000.0, 1000.0, 1100.0, 1100.0],  # outside the image, on either side
    [-900.0, -900.0, -800.0, -850.0],
    [0.0, 500.0, 96.0, 600.0],
    [20.0, 20.0, 20.0, 20.0],  # a point
    [20.0, 20.0, 60.0, 20.0],  # a line
]


def mask_of(family: str, boxes: list[list[float]], valid: list[bool]) -> Tensor:
    return functions_of(family).response_mask(make_priors(), torch.tensor([boxes]), torch.tensor([valid]))[0]


def loss_of(family: str, teacher: RawPredictions, student: RawPredictions, mask: Tensor, **weights: float) -> Tensor:
    return response_loss(teacher, student, mask, functions=functions_of(family), **weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_boxes_outside_the_image_or_without_area_mask_nothing(family: str) -> None:
    assert not mask_of(family, NOWHERE, [True] * 5).any()
    alone = mask_of(family, [GOOD], [True])
    assert alone.any()
    assert torch.equal(mask_of(family, [GOOD, *NOWHERE], [True] * 6), alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_than_k_mask_what_they_alone_do(family: str) -> None:
    others = random_boxes((4,), image=SIZE, largest=60.0).tolist()
    assert torch.equal(mask_of(family, [GOOD, *others], [True] + [False] * 4), mask_of(family, [GOOD], [True]))
    assert not mask_of(family, [GOOD, *others], [False] * 5).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_no_instance_is_exactly_zero_with_a_graph(family: str) -> None:
    teacher, student = make_raw(family), make_raw(family, graph=True)
    for boxes in (torch.zeros(2, 0, 4), torch.tensor([NOWHERE, NOWHERE])):
        valid = torch.ones(boxes.shape[:2], dtype=torch.bool)
        mask = functions_of(family).response_mask(student.priors, boxes, valid)
        assert mask.shape == (2, R)
        loss = loss_of(family, teacher, student, mask)
        assert loss.item() == 0
        gradients = torch.autograd.grad(loss, leaves(student))
        assert not any(bool(g.any()) for g in gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_instance_in_one_image_of_two(family: str) -> None:
    teacher, student = make_raw(family), make_raw(family, graph=True)
    mask = torch.stack([mask_of(family, [GOOD], [True]), torch.zeros(R, dtype=torch.bool)])
    loss = loss_of(family, teacher, student, mask)
    functions, chosen = functions_of(family), mask[0]
    cls, reg = functions.response_cls_loss(teacher, student), functions.response_reg_loss(teacher, student)
    expected = sum((0.1 * cls[0, r] + reg[0, r]).item() for r in range(R) if chosen[r]) / int(chosen.sum()) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    for gradient in torch.autograd.grad(loss, leaves(student)):
        assert torch.isfinite(gradient).all()
        assert gradient[mask].any()
        assert not gradient[~mask].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_identical_predictions(family: str) -> None:
    teacher = make_raw(family)
    if family == "fcos":  # the centre-ness is a soft target too: certain of it, its cross entropy is 0
        teacher = with_leaves(teacher, [teacher.logits, teacher.regression, torch.full((2, R), 1e4)])
    student = with_leaves(teacher, [x.clone().requires_grad_() for x in leaves(teacher)])
    mask = torch.ones(2, R, dtype=torch.bool)
    box = loss_of(family, teacher, student, mask, alpha=0.0, beta=1.0)
    assert box.item() == 0
    gradient = torch.autograd.grad(box, student.regression)[0]
    # Smooth L1's is 0; those of the parts of an IoU are equal and opposite, up to float32's rounding
    assert gradient.abs().max() < 1e-6
    loss = loss_of(family, teacher, student, mask, alpha=1.0, beta=1.0)
    y = teacher.logits.double().sigmoid()
    entropy = -(y * y.log() + (1 - y) * (1 - y).log()).sum(-1).mean()  # the least a cross entropy can be
    assert loss.item() == pytest.approx(entropy.item(), rel=1e-5)
    assert torch.autograd.grad(loss, student.logits)[0].abs().max() < 1e-6
    for _ in range(20):
        moved = student.logits.detach() + torch.randn_like(student.logits) * 0.1
        other = with_leaves(teacher, [moved, *leaves(student)[1:]])
        assert loss_of(family, teacher, other, mask, alpha=1.0, beta=1.0) > loss


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_predictions_in_half_precision_stay_finite(family: str, dtype: torch.dtype) -> None:
    # Of images of 1024 px: the area of a box is 16 times what float16 holds
    priors = make_priors() * 12
    teacher, student = make_raw(family, dtype=dtype), make_raw(family, dtype=dtype)
    teacher, student = (with_leaves(x, [40 * x.logits, *leaves(x)[1:]]) for x in (teacher, student))
    student = with_leaves(student, [x.detach().requires_grad_() for x in leaves(student)])
    raws = [RawPredictions(x.logits, x.regression, priors, x.decoder, x.centerness) for x in (teacher, student)]
    assert raws[0].boxes.dtype == torch.float32
    loss = loss_of(family, *raws, torch.ones(2, R, dtype=torch.bool))
    assert loss.dtype == torch.float32
    for gradient in torch.autograd.grad(loss, leaves(student)):
        assert gradient.dtype == dtype
        assert torch.isfinite(gradient).all()
    wide = [
        RawPredictions(*(v.detach().float() for v in (x.logits, x.regression)), priors, x.decoder, c)
        for x in raws
        for c in [None if x.centerness is None else x.centerness.detach().float()]
    ]
    assert torch.equal(loss.detach(), loss_of(family, *wide, torch.ones(2, R, dtype=torch.bool)))


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_yolo_equals_the_loop(alpha: float, beta: float) -> None:
    # CIoU's trade-off is held constant for the gradient, so that finite differences do not give it: an oracle does
    teacher, student = make_raw("yolo"), make_raw("yolo", graph=True)
    mask = torch.rand(2, R) < 0.4
    mask[1, 3:] = False
    oracle = with_leaves(student, [x.detach().double().requires_grad_() for x in leaves(student)])
    expected = naive_response(teacher, oracle, mask, alpha=alpha, beta=beta)
    loss = loss_of("yolo", teacher, student, mask, alpha=alpha, beta=beta)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    loss.backward()
    expected.backward()
    for x, wanted in zip(leaves(student), leaves(oracle), strict=True):
        wanted = torch.zeros_like(wanted) if wanted.grad is None else wanted.grad
        torch.testing.assert_close(x.grad.double(), wanted, rtol=1e-3, atol=1e-6)


def test_the_oracle_of_ciou_equals_ultralytics() -> None:
    a, b = random_boxes((50,), smallest=4.0).double(), random_boxes((50,), smallest=4.0).double()
    expected = 1 - bbox_iou(a, b, xywh=False, CIoU=True).squeeze(-1)
    for i in range(50):
        assert float(naive_ciou(list(a[i]), list(b[i]))) == pytest.approx(expected[i].item(), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_round_yolos_boxes(dtype: torch.dtype) -> None:
    regression = torch.randn(2, R, 64) * 3
    expected = decode_dfl(regression, make_priors())
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(decode_dfl(regression, make_priors()), expected)
