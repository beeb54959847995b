import pytest
import torch
from reference.boxes import random_boxes
from reference.distill import naive_response
from response_helpers import FAMILIES, functions_of, leaves
from response_helpers import make_raw as make_any

from gid_yolo.detectors import RetinaNet, build_detector
from gid_yolo.distill import response_loss
from gid_yolo.distill.response import mean_of_all, mean_of_masked
from gid_yolo.ops.boxes import decode_deltas
from gid_yolo.ops.structures import RawPredictions

B, R, C = 3, 9, 4
PRIORS = [[8.0 * i, 0.0, 8.0 * i + 16, 16.0] for i in range(R)]


@pytest.fixture(scope="module")
def retina() -> RetinaNet:
    return build_detector("retina_nano", C)


def make_mask() -> torch.Tensor:
    mask = torch.rand(B, R) > 0.5
    mask[0, :2], mask[0, 2] = True, False
    mask[1] = False  # an image no anchor of which matches
    return mask


def make_raw(*, requires_grad: bool = False, dtype: torch.dtype = torch.float32) -> RawPredictions:
    logits, deltas = (torch.randn(B, R, C) * 2).to(dtype), torch.randn(B, R, 4).to(dtype)
    priors = torch.tensor(PRIORS)
    return RawPredictions(
        logits.requires_grad_(requires_grad), deltas.requires_grad_(requires_grad), priors, decode_deltas
    )


def slice_raw(raw: RawPredictions, b: int) -> RawPredictions:
    return RawPredictions(raw.logits[b : b + 1], raw.regression[b : b + 1], raw.priors, raw.decoder)


def to(raw: RawPredictions, dtype: torch.dtype) -> RawPredictions:
    return RawPredictions(raw.logits.to(dtype), raw.regression.to(dtype), raw.priors, raw.decoder)


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 1.0), (1.0, 0.0), (0.0, 1.0), (2.0, 3.0)])
@pytest.mark.parametrize("box_beta", [0.0, 0.5])
def test_equation_8_and_its_gradient_equal_the_loop(alpha: float, beta: float, box_beta: float) -> None:
    functions = build_detector("retina_nano", C, box_beta=box_beta)
    teacher, student, mask = make_raw(), make_raw(requires_grad=True), make_mask()
    logits, deltas = (x.detach().double().requires_grad_() for x in (student.logits, student.regression))
    expected = naive_response(
        teacher.logits, logits, teacher.regression, deltas, mask, alpha=alpha, beta=beta, box_beta=box_beta
    )
    loss = response_loss(teacher, student, mask, functions=functions, alpha=alpha, beta=beta)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    expected.backward()
    loss.backward()
    for gradient, oracle in ((student.logits.grad, logits.grad), (student.regression.grad, deltas.grad)):
        oracle = torch.zeros(gradient.shape, dtype=torch.float64) if oracle is None else oracle
        torch.testing.assert_close(gradient.double(), oracle, rtol=1e-4, atol=1e-7)
        assert not gradient[~mask].any()


def test_defaults_are_the_papers(retina: RetinaNet) -> None:
    teacher, student, mask = make_raw(), make_raw(), make_mask()
    expected = response_loss(teacher, student, mask, functions=retina, alpha=0.1, beta=1.0)
    assert torch.equal(response_loss(teacher, student, mask, functions=retina), expected)


def test_batch_is_the_mean_of_its_images(retina: RetinaNet) -> None:
    teacher, student, mask = make_raw(), make_raw(), make_mask()
    single = [
        response_loss(slice_raw(teacher, b), slice_raw(student, b), mask[b : b + 1], functions=retina).item()
        for b in range(B)
    ]
    assert single[1] == 0
    loss = response_loss(teacher, student, mask, functions=retina).item()
    assert loss == pytest.approx(sum(single) / B, rel=1e-6)


def test_identical_predictions(retina: RetinaNet) -> None:
    teacher = make_raw()
    student = RawPredictions(
        teacher.logits.clone().requires_grad_(),
        teacher.regression.clone().requires_grad_(),
        teacher.priors,
        decode_deltas,
    )
    mask = make_mask()
    box = response_loss(teacher, student, mask, functions=retina, alpha=0.0)
    assert box.item() == 0
    # Cross entropy against a soft target is at its lowest, the target's entropy, where both agree: no gradient.
    loss = response_loss(teacher, student, mask, functions=retina, alpha=1.0, beta=1.0)
    loss.backward()
    assert student.logits.grad.abs().max() < 1e-6  # sigmoid(z) - y, each rounded to 2**-24
    assert not student.regression.grad.any()
    y = teacher.logits.double().sigmoid()
    entropy = -(y * y.log() + (1 - y) * (1 - y).log()).sum(-1)
    images = [entropy[b][mask[b]].mean().item() if mask[b].any() else 0.0 for b in range(B)]
    assert loss.item() == pytest.approx(sum(images) / B, rel=1e-5)


def test_nothing_masked_is_exactly_zero_with_a_graph(retina: RetinaNet) -> None:
    student = make_raw(requires_grad=True)
    loss = response_loss(make_raw(), student, torch.zeros(B, R, dtype=torch.bool), functions=retina)
    assert loss.item() == 0
    loss.backward()
    assert not student.logits.grad.any()
    assert not student.regression.grad.any()


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)])
def test_half_precision(retina: RetinaNet, dtype: torch.dtype, rounding: float) -> None:
    teacher, student, mask = make_raw(), make_raw(), make_mask()
    rounded = to(teacher, dtype), to(student, dtype)
    loss = response_loss(*rounded, mask, functions=retina)
    assert loss.dtype == torch.float32
    expected = response_loss(*(to(raw, torch.float32) for raw in rounded), mask, functions=retina)
    assert torch.equal(loss, expected)
    # |d loss / d delta| = 1 and |d loss / d logit| <= 0.1 max(1, |z| / 4), for each of 8 deltas and 8 logits
    largest = max(x.abs().max().item() for raw in (teacher, student) for x in (raw.logits, raw.regression))
    bound = rounding * largest * (8 * 1 + 8 * 0.1 * max(1.0, largest / 4))
    assert abs(loss - response_loss(teacher, student, mask, functions=retina)) < bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_predictions_stay_finite(retina: RetinaNet, dtype: torch.dtype) -> None:
    priors = torch.tensor(PRIORS)
    big, small = torch.full((B, R, C), 300.0).to(dtype), torch.full((B, R, C), -300.0).to(dtype).requires_grad_()
    deltas = torch.full((B, R, 4), 3e4).to(dtype)
    loss = response_loss(
        RawPredictions(big, deltas, priors, decode_deltas),
        RawPredictions(small, -deltas, priors, decode_deltas),
        torch.ones(B, R, dtype=torch.bool),
        functions=retina,
        alpha=1.0,
    )
    loss.backward()
    # A logit of -300 against a target of 1 costs 300 in each class, a delta is 6e4 off (3e4 after rounding)
    assert loss.item() == pytest.approx(C * 300 + 4 * 2 * deltas[0, 0, 0].item(), rel=1e-6)
    assert torch.isfinite(small.grad).all()


def test_autocast_changes_nothing(retina: RetinaNet) -> None:
    teacher, student, mask = make_raw(), make_raw(), make_mask()
    expected = response_loss(teacher, student, mask, functions=retina)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(response_loss(teacher, student, mask, functions=retina), expected)


def test_equation_7_is_the_task_assignment(retina: RetinaNet) -> None:
    from reference.retinanet import torchvision_matches

    with torch.no_grad():
        priors = retina.eval().raw(torch.zeros(1, 3, 96, 160))[1].priors
    boxes = random_boxes((2, 5), image=(96.0, 160.0), smallest=8.0, largest=90.0)
    valid = torch.tensor([[True] * 5, [True, True, False, False, False]])
    mask = retina.response_mask(priors, boxes, valid)
    for b in range(2):
        assert torch.equal(mask[b], torchvision_matches(priors, boxes[b][valid[b]]) >= 0)
    assert not retina.response_mask(priors, boxes, torch.zeros_like(valid)).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_gpu_computes_is_what_a_cpu_computes(family: str) -> None:
    teacher, functions = make_any(family, batch=3), functions_of(family)
    mask = torch.rand(3, len(teacher.priors)) > 0.7
    mask[1] = False

    def losses(*raws: RawPredictions) -> torch.Tensor:
        return functions.response_cls_loss(*raws) + functions.response_reg_loss(*raws)

    found = []
    for mean in (mean_of_all, mean_of_masked):
        torch.manual_seed(1)
        student = make_any(family, batch=3, graph=True)
        loss = mean(losses, teacher, student, mask)
        found.append((loss, *torch.autograd.grad(loss, leaves(student), allow_unused=True, materialize_grads=True)))
    assert found[0][0] > 0
    for everywhere, masked in zip(*found, strict=True):
        torch.testing.assert_close(everywhere, masked)
