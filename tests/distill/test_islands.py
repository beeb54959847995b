"""No loss computes in half precision: an audit of every operation, and float64's values of features whose squares fp16
cannot hold.

What `test_autocast.py` bounds is the rounding of what comes in. Here the same rounded numbers go into both sides, so
that only float32's own rounding is left.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from reference.boxes import random_boxes
from response_helpers import FAMILIES, SIZE, R, functions_of, leaves, make_raw, with_leaves
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gid_yolo.detectors.box_head import BoxSamples, box_head_losses
from gid_yolo.detectors.rpn import rpn_losses
from gid_yolo.distill import feature_loss, relation_loss, response_loss, select_general_instances
from gid_yolo.distill.fine_grained import fine_grained_loss
from gid_yolo.distill.fitnet import fitnet_loss
from gid_yolo.distill.mimicking import mimicking_loss
from gid_yolo.distill.pairing import pair_predictions
from gid_yolo.ops.sample import SampleRule
from gid_yolo.ops.structures import Targets

FORMATS = [torch.float16, torch.bfloat16]
OWN_TASK_LOSS = [family for family in FAMILIES if family not in {"yolo", "faster_rcnn"}]  # these are called apart
# Operations that move numbers and compute none; `gather` and `index` give a sum on the way back, here of one number and
# zeros, for no place is taken twice
MOVES = {
    *("_to_copy", "clone", "copy_", "detach", "view", "_unsafe_view", "alias", "lift_fresh", "expand", "contiguous"),
    *(
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "unbind",
        "unsqueeze",
        "squeeze",
        "t",
        "transpose",
        "permute",
        "unfold",
        "as_strided",
    ),
    *("gather", "index", "index_select", "cat", "stack", "new_zeros", "zeros_like", "empty_like", "new_empty_strided"),
    *("select_backward", "slice_backward", "scatter_add", "index_put"),
}
EPS = 2.0**-24  # float32's rounding


class Audit(TorchDispatchMode):
    """Counts the operations that give half precision, but for `MOVES`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) and x.dtype in FORMATS for x in tree_leaves(out)):
            name = function._schema.name.removeprefix("aten::")
            if name not in MOVES:
                self.found[name] += 1
        return out


def audited(dtype: torch.dtype, function, *arguments, **settings) -> Counter[str]:
    """What a loss of half precision's numbers, under autocast, computes in it, forth and back."""
    inputs = [x for x in tree_leaves((arguments, settings)) if isinstance(x, Tensor) and x.requires_grad]
    with Audit() as audit:
        with torch.autocast("cpu", dtype=dtype):
            out = function(*arguments, **settings)
        terms = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        assert all(x.dtype not in FORMATS for x in terms)
        slopes = [x for x in terms if x.requires_grad]
        if slopes:
            torch.autograd.grad(sum(x.sum() for x in slopes), inputs, allow_unused=True)
    return audit.found


def half_of(raw, dtype: torch.dtype):
    return with_leaves(raw, [x.detach().to(dtype).requires_grad_() for x in leaves(raw)])


def make_targets() -> Targets:
    boxes = random_boxes((2, 4), image=SIZE, smallest=10.0, largest=50.0)
    return Targets(boxes, torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool))


def large(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Numbers of either sign around 300, whose square is beyond float16."""
    assert torch.isinf(torch.tensor(300.0).half() ** 2)
    return ((torch.rand(shape) * 100 + 250) * torch.randn(shape).sign()).to(dtype)


def test_the_audit_finds_a_square() -> None:
    x = torch.randn(3, 4).half().requires_grad_()
    assert set(audited(torch.float16, lambda x: (x - 1).square().sum().float(), x)) >= {"sub", "pow", "sum"}
    with torch.autocast("cpu", dtype=torch.float16):
        y = torch.randn(3, 4).requires_grad_()
    assert "mm" in audited(torch.float16, lambda y: (y @ y.mT).float().sum(), y)  # autocast's own doing


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("family", OWN_TASK_LOSS)
def test_no_task_loss_computes_in_half_precision(family: str, dtype: torch.dtype) -> None:
    raw, detector = half_of(make_raw(family), dtype), functions_of(family)
    assert not audited(dtype, lambda *_: detector.loss([], raw, make_targets(), SIZE), *leaves(raw))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("family", OWN_TASK_LOSS)
def test_task_losses_of_very_sure_predictions_equal_float64(family: str, dtype: torch.dtype) -> None:
    # Logits up to 6e4 that are wrong as often as right: exp of them is beyond float32, their sum beyond float16
    raw, targets, detector = make_raw(family), make_targets(), functions_of(family)
    raw = half_of(with_leaves(raw, [raw.logits.sign() * 6e4, *leaves(raw)[1:]]), dtype)
    exact_raw = replace(raw, priors=raw.priors.double())
    exact_raw = with_leaves(exact_raw, [x.detach().double().requires_grad_() for x in leaves(raw)])
    losses, exact = detector.loss([], raw, targets, SIZE), detector.loss([], exact_raw, targets, SIZE)
    for name, value in losses.items():
        assert exact[name].dtype == torch.float64 or name == "ctr_loss"
        # Boxes of 10 px and more at coordinates of at most 200 px: an IoU has 32 times the rounding of a coordinate
        assert value.item() == pytest.approx(exact[name].item(), rel=32 * ROUNDINGS * EPS), name
    # Over the size of a term, times 2^16: as a gradient scaler keeps them among float16's numbers
    slopes, exact_slopes = (
        torch.autograd.grad(sum(2.0**16 * x / x.detach() for x in terms.values()), leaves(inputs))
        for terms, inputs in ((losses, raw), (exact, exact_raw))
    )
    for slope, wanted in zip(slopes, exact_slopes, strict=True):
        assert torch.isfinite(slope).all()
        assert float((slope.double() - wanted).norm() / wanted.norm()) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", FORMATS)
def test_no_loss_of_faster_rcnn_does(dtype: torch.dtype) -> None:
    raw, rule = half_of(make_raw("faster_rcnn"), dtype), SampleRule(0.5, 0.5, 8, 0.5)
    keys = torch.rand(2, R)
    assert not audited(dtype, lambda *_: rpn_losses(raw, make_targets(), keys, rule=rule, beta=0.1), *leaves(raw))
    boxes, objects = random_boxes((2, 8), image=SIZE), random_boxes((2, 8), image=SIZE)
    labels = torch.randint(0, 4, (2, 8))
    samples = BoxSamples(boxes, labels, objects, torch.ones(2, 8, dtype=torch.bool))
    logits, deltas = (torch.randn(2, 8, *n).to(dtype).requires_grad_() for n in ((4,), (3, 4)))
    weights = torch.tensor([10.0, 10, 5, 5])
    assert not audited(dtype, box_head_losses, logits, deltas, samples, weights=weights, beta=0.1)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_response_loss_does(family: str, dtype: torch.dtype) -> None:
    teacher, student = make_raw(family, dtype=dtype), half_of(make_raw(family), dtype)
    mask, functions = torch.ones(2, R, dtype=torch.bool), functions_of(family)
    loss = lambda *_: response_loss(teacher, student, mask, functions=functions)  # noqa: E731
    assert not audited(dtype, loss, *leaves(student))


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_choice_of_instances_does_not(dtype: torch.dtype) -> None:
    teacher, student = (make_raw("retinanet", dtype=dtype) for _ in range(2))

    def choose(function) -> list[Tensor]:
        return tree_leaves(function(teacher.scores, student.scores, teacher.boxes, student.boxes))

    assert not audited(dtype, choose, lambda *raws: vars(select_general_instances(*raws)))
    assert not audited(dtype, choose, pair_predictions)


VALID = torch.tensor([[True] * 40, [True] * 3 + [False] * 37])
SHAPES = ((6, 8), (3, 4))
CELLS = 6 * 8 + 3 * 4
# Of squared distances every summand is positive: sum over at most 40 * 8 * 16 = 5120 of them in blocks, the rounding of
# a difference (twice, squared) and of a square; well under 32 roundings. Normalised distances are about 1 and smooth
# L1's slope is at most 1, so that the relation's error is that of two distances, and of their mean, absolute
ROUNDINGS = 32


def feature_terms(dtype: torch.dtype) -> dict:
    """Every loss of features, of crops (2, 40, 8, 4, 4) or of two maps, as a function of (teacher, student)."""
    crops = lambda: (large((2, 40, 8, 4, 4), dtype), large((2, 40, 8, 4, 4), dtype))  # noqa: E731
    flat = lambda: (large((2, 8, CELLS), dtype), large((2, 8, CELLS), dtype))  # noqa: E731

    def pyramid(x: Tensor) -> list[Tensor]:
        return [part.unflatten(-1, shape) for part, shape in zip(x.split([48, 12], dim=-1), SHAPES, strict=True)]

    mask = torch.rand(2, CELLS) > 0.5
    return {
        "feature": (lambda t, s: feature_loss(t, s, VALID), crops()),
        "pixel": (lambda t, s: feature_loss(t, s, VALID, normalize="pixel"), crops()),
        "relation": (lambda t, s: relation_loss(t, s, VALID), crops()),
        "relation of few": (lambda t, s: relation_loss(t[:, :10], s[:, :10], VALID[:, :10]), crops()),
        "mimicking": (lambda t, s: mimicking_loss(t, s, VALID), crops()),
        "fitnet": (lambda t, s: fitnet_loss(pyramid(t), pyramid(s)), flat()),
        "fine_grained": (lambda t, s: fine_grained_loss(pyramid(t), pyramid(s), mask), flat()),
    }


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", feature_terms(torch.float16))
def test_features_whose_squares_overflow_equal_float64(name: str, dtype: torch.dtype, autocast: bool) -> None:
    loss, (teacher, student) = feature_terms(dtype)[name]
    student.requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        value = loss(teacher, student)
    exact_student = student.detach().double().requires_grad_()
    exact = loss(teacher.double(), exact_student)
    assert value.dtype == torch.float32
    tolerance = ROUNDINGS * EPS * (1.0 if name.startswith("relation") else exact.item())
    assert abs(value.item() - exact.item()) <= tolerance
    scale = 2.0**10 / exact.item()  # as a gradient scaler keeps gradients among float16's numbers
    slope, exact_slope = (
        torch.autograd.grad(x * scale, y)[0].double() for x, y in ((value, student), (exact, exact_student))
    )
    assert torch.isfinite(slope).all()
    unit = torch.finfo(dtype).eps / 2  # the one rounding of the gradient that is handed back
    assert float((slope - exact_slope).norm() / exact_slope.norm()) <= 2 * unit


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", feature_terms(torch.float16))
def test_no_loss_of_features_computes_in_half_precision(name: str, dtype: torch.dtype) -> None:
    loss, (teacher, student) = feature_terms(dtype)[name]
    assert not audited(dtype, loss, teacher, student.requires_grad_())
