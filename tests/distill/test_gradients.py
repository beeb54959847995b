"""Every term's gradient against finite differences, in float64.

The points are random, and a test says so where one must keep away from a kink: there the two one-sided derivatives
differ, and a finite difference is neither. YOLO's box term is not here: CIoU holds its trade-off constant for the
gradient by definition, so that an oracle gives it (`test_response_families.py`).
"""

from collections.abc import Sequence

import pytest
import torch
from reference.boxes import random_boxes
from response_helpers import SIZE, STRIDES, R, functions_of, leaves, make_raw, with_leaves
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call

from gid_yolo.distill import GIDLoss, feature_loss, relation_loss, response_loss
from gid_yolo.distill.feature import Adaptation, PyramidAdaptation, plan_rois, roi_features
from gid_yolo.distill.fine_grained import fine_grained_loss
from gid_yolo.distill.fitnet import fitnet_loss
from gid_yolo.distill.mimicking import mimicking_loss
from gid_yolo.distill.relation import normalised_distances
from gid_yolo.ops.losses import soft_bce

VALID = torch.tensor([[True, True, True], [True, False, True], [True, False, False], [False] * 3])
KINK = 1e-4  # how far from a kink a point must lie: finite differences step 1e-6


def crops(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def pyramid(channels: Sequence[int]) -> list[Tensor]:
    return [crops(2, c, SIZE[0] // s, SIZE[1] // s) for c, s in zip(channels, STRIDES, strict=True)]


def of_module(module: torch.nn.Module, inputs: Sequence[Tensor], parameters: Sequence[Tensor]):
    names = [name for name, _ in module.named_parameters()]
    return functional_call(module, dict(zip(names, parameters, strict=True)), (list(inputs),))


@pytest.mark.parametrize("normalize", ["instance", "pixel"])
def test_feature(normalize: str) -> None:
    teacher = crops(4, 3, 2, 2, 2).detach()
    assert gradcheck(lambda s: feature_loss(teacher, s, VALID, normalize=normalize), crops(4, 3, 2, 2, 2))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("spread", [1.0, 20.0])  # 20: differences in the linear part of smooth L1 too
def test_relation(reduction: str, spread: float) -> None:
    teacher = crops(4, 3, 2, 2, 2).detach()
    student = crops(4, 3, 2, 2, 2).detach()
    student[:, 0] *= spread
    teacher[:, 1] *= spread
    pairs = VALID[:, :, None] & VALID[:, None] & ~torch.eye(3, dtype=torch.bool)
    gap = (normalised_distances(teacher, pairs) - normalised_distances(student, pairs)).abs()
    assert (gap - 1).abs().min() > KINK
    assert (gap > 1).any() == (spread > 1)
    assert gradcheck(lambda s: relation_loss(teacher, s, VALID, reduction=reduction), student.requires_grad_())


def test_relation_where_two_instances_coincide() -> None:
    # The root of their distance has no derivative there: their own pair gives none, the other pairs theirs
    teacher = crops(1, 3, 2, 2, 2).detach()
    student = crops(1, 3, 2, 2, 2).detach()
    student[:, 1] = student[:, 0]
    student.requires_grad_()
    valid = torch.ones(1, 3, dtype=torch.bool)
    (gradient,) = torch.autograd.grad(relation_loss(teacher, student, valid), student)
    assert torch.isfinite(gradient).all()
    assert gradient[0, 2].any()
    # Of the third instance alone it is smooth
    rest = student.detach()[:, :2]
    assert gradcheck(
        lambda s: relation_loss(teacher, torch.cat([rest, s], dim=1), valid), student.detach()[:, 2:].requires_grad_()
    )


@pytest.mark.parametrize("family", ["retinanet", "retinanet_giou", "fcos", "faster_rcnn"])
@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_response(family: str, alpha: float, beta: float) -> None:
    # The kinks of GIoU, where two corners coincide, and of smooth L1 have no measure; these points miss them
    teacher, student = (make_raw(family, dtype=torch.float64, graph=g) for g in (False, True))
    mask = torch.rand(2, R) < 0.3
    assert mask.any(1).all()

    def loss(*values: Tensor) -> Tensor:
        raw = with_leaves(student, list(values))
        return response_loss(teacher, raw, mask, functions=functions_of(family), alpha=alpha, beta=beta)

    assert gradcheck(loss, leaves(student))


def test_soft_bce_and_yolos_classes() -> None:
    target = torch.randn(3, 4, dtype=torch.float64) * 5
    assert gradcheck(lambda z: soft_bce(z, target), crops(3, 4))


@pytest.mark.parametrize("kernel", [1, 3])
def test_adaptation(kernel: int) -> None:
    module = Adaptation(2, 3, kernel).double()
    teacher, valid = crops(2, 3, 3, 2, 2).detach(), VALID[:2]
    inputs = [crops(2, 3, 2, 2, 2), *(p.detach().clone().requires_grad_() for p in module.parameters())]

    def loss(student: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        adapted = functional_call(module, {"conv.weight": weight, "conv.bias": bias}, (student,))
        return feature_loss(teacher, adapted, valid)

    assert gradcheck(loss, inputs)


def test_adaptation_of_every_level_and_the_crops() -> None:
    module = PyramidAdaptation((2, 3), (3, 4)).double()
    boxes = random_boxes((2, 3), image=(40.0, 60.0), smallest=12.0, largest=24.0)
    boxes[:, 1:] = torch.tensor([0.0, 0.0, 60.0, 60.0])
    plan = plan_rois(boxes, STRIDES, SIZE)
    assert all(len(rois) for rois in plan.rois)
    teacher = crops(2, 3, 4, 2, 2).detach()
    maps, parameters = pyramid((2, 3)), [p.detach().clone().requires_grad_() for p in module.parameters()]

    def loss(first: Tensor, second: Tensor, *values: Tensor) -> Tensor:
        student = roi_features(
            [first, second], plan, STRIDES, size=2, adapt=lambda x: of_module(module, x, values)
        )  # fmt: skip
        return feature_loss(teacher, student, VALID[:2]) + relation_loss(teacher, student, VALID[:2])

    assert gradcheck(loss, [*maps, *parameters])


@pytest.mark.parametrize("method", ["fitnet", "fine_grained"])
@pytest.mark.parametrize("channels", [((2, 2), (3, 3)), ((2, 3), (3, 4))])  # one adaptation, and one a level
def test_whole_maps(method: str, channels: tuple[tuple[int, int], tuple[int, int]]) -> None:
    shared = channels[0][0] == channels[0][1]
    own, theirs = (c[0] if shared else c for c in channels)
    module = PyramidAdaptation(own, theirs, kernel_size=3).double()
    teacher = [x.detach() for x in pyramid(channels[1])]
    mask = torch.rand(2, R) < 0.4
    maps, parameters = pyramid(channels[0]), [p.detach().clone().requires_grad_() for p in module.parameters()]

    def loss(first: Tensor, second: Tensor, *values: Tensor) -> Tensor:
        student = of_module(module, [first, second], values)
        return fitnet_loss(teacher, student) if method == "fitnet" else fine_grained_loss(teacher, student, mask)

    assert gradcheck(loss, [*maps, *parameters])


def test_mimicking() -> None:
    teacher = crops(4, 3, 2, 2, 2).detach()
    assert gradcheck(lambda s: mimicking_loss(teacher, s, VALID), crops(4, 3, 2, 2, 2))


@pytest.mark.parametrize("family", ["retinanet", "fcos", "faster_rcnn"])
def test_the_whole_of_equation_9(family: str) -> None:
    # The teacher is the more sure one everywhere, so that the boxes of equation 2 are its own: the student's would move
    # with the finite step, but the selection passes no gradient by design
    teacher, student = (make_raw(family, dtype=torch.float64, graph=g) for g in (False, True))
    with torch.no_grad():
        teacher.logits.abs_().add_(1.0)
        student.logits.abs_().neg_()
    gid = GIDLoss(2, 3, top_k=4, roi_size=2, weights={"feature": 0.5, "relation": 2.0, "response": 1.0}).double()
    theirs = [x.detach() for x in pyramid((3, 3))]
    own, parameters = pyramid((2, 2)), [p.detach().clone().requires_grad_() for p in gid.parameters()]
    names = [f"{name}" for name, _ in gid.named_parameters()]

    def terms(*values: Tensor) -> Tensor:
        raw = with_leaves(student, list(values[4:]))
        settings = {"functions": functions_of(family), "strides": STRIDES, "image_size": SIZE}
        arguments = theirs, list(values[:2]), teacher, raw
        found, instances = functional_call(gid, dict(zip(names, values[2:4], strict=True)), arguments, settings)
        assert instances.valid.all()
        assert (instances.boxes[..., 2:] > instances.boxes[..., :2]).all()
        return torch.stack(list(found.values()))

    assert gradcheck(terms, [*own, *parameters, *leaves(student)])
