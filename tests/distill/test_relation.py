import pytest
import torch
from reference.distill import naive_relation

from gid_yolo.distill import relation_loss
from gid_yolo.distill.relation import MANY, distances

VALID = torch.tensor([[True, True, True, True], [True, False, True, False], [True, False, False, False], [False] * 4])


def make_crops(*, requires_grad: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 4, 3, 2, 2), torch.randn(4, 4, 3, 2, 2).requires_grad_(requires_grad)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("spread", [1.0, 20.0])
def test_equation_6_and_its_gradient_equal_the_loop(reduction: str, spread: float) -> None:
    teacher, student = make_crops()
    student[:, 0] *= spread  # normalised distances further than 1 apart reach the linear part of smooth L1
    student.requires_grad_()
    oracle_student = student.detach().double().requires_grad_()
    expected = naive_relation(teacher, oracle_student, VALID, mean=reduction == "mean")
    loss = relation_loss(teacher, student, VALID, reduction=reduction)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(student.grad.double(), oracle_student.grad, rtol=1e-4, atol=1e-6)


def test_default_is_the_mean_over_pairs() -> None:
    teacher, student = make_crops()
    assert torch.equal(relation_loss(teacher, student, VALID), relation_loss(teacher, student, VALID, reduction="mean"))


def test_sum_counts_ordered_pairs() -> None:
    # Eq. 6's set of pairs has (i, j) and (j, i). Distances: teacher 1, 1, 2, phi 4/3; student 1, 2, 3, phi 2.
    teacher = torch.tensor([0.0, 1, 2]).view(1, 3, 1, 1, 1)
    student = torch.tensor([0.0, 1, 3]).view(1, 3, 1, 1, 1)
    differences = [1 / (4 / 3) - 1 / 2, 1 / (4 / 3) - 2 / 2, 2 / (4 / 3) - 3 / 2]
    expected = 2 * sum(d * d / 2 for d in differences)
    valid = torch.ones(1, 3, dtype=torch.bool)
    assert relation_loss(teacher, student, valid, reduction="sum").item() == pytest.approx(expected, rel=1e-5)


def test_scale_of_the_features_does_not_matter() -> None:
    teacher, student = make_crops()
    expected = relation_loss(teacher, student, VALID).item()
    assert relation_loss(teacher * 50, student / 7, VALID).item() == pytest.approx(expected, rel=1e-4)


def test_pairs_never_cross_images() -> None:
    teacher, student = make_crops(requires_grad=True)
    valid = torch.ones(4, 4, dtype=torch.bool)
    first = relation_loss(teacher[:1], student[:1], valid[:1])
    (gradient,) = torch.autograd.grad(first, student)
    for other in (0.0, 3.0, 1e4):
        changed = torch.cat([student[:1], student[1:] * other])
        loss = relation_loss(torch.cat([teacher[:1], teacher[1:] * other]), changed, valid)
        rest = relation_loss(teacher[1:] * other, student[1:] * other, valid[1:])
        assert (loss * 4 - rest * 3).item() == pytest.approx(first.item(), rel=1e-4)
        (full,) = torch.autograd.grad(loss * 4, student)
        torch.testing.assert_close(full[0], gradient[0], rtol=1e-4, atol=1e-7)


def test_batch_is_the_mean_of_its_images() -> None:
    teacher, student = make_crops()
    for reduction in ("mean", "sum"):
        single = [
            relation_loss(teacher[b : b + 1], student[b : b + 1], VALID[b : b + 1], reduction=reduction).item()
            for b in range(4)
        ]
        loss = relation_loss(teacher, student, VALID, reduction=reduction).item()
        assert loss == pytest.approx(sum(single) / 4, rel=1e-6)


def test_invalid_instances_change_nothing() -> None:
    teacher, student = make_crops()
    expected = relation_loss(teacher, student, VALID)
    student[~VALID] = 1e6
    teacher[~VALID] = -1e6
    assert torch.equal(relation_loss(teacher, student, VALID), expected)


def test_identical_features_are_exactly_zero() -> None:
    teacher, _ = make_crops()
    student = teacher.clone().requires_grad_()
    loss = relation_loss(teacher, student, VALID)
    assert loss.item() == 0
    loss.backward()
    assert not student.grad.any()


@pytest.mark.parametrize("valid", [[False, False, False], [False, True, False]])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_fewer_than_two_instances_are_exactly_zero_with_a_graph(valid: list[bool], reduction: str) -> None:
    teacher, student = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2, requires_grad=True)
    loss = relation_loss(teacher, student, torch.tensor([valid] * 2), reduction=reduction)
    assert loss.item() == 0
    loss.backward()
    assert not student.grad.any()


@pytest.mark.parametrize("k", [0, 1])
def test_no_pair_in_the_batch(k: int) -> None:
    student = torch.randn(2, k, 4, 2, 2, requires_grad=True)
    loss = relation_loss(torch.randn(2, k, 4, 2, 2), student, torch.ones(2, k, dtype=torch.bool))
    assert loss.item() == 0
    loss.backward()
    assert not student.grad.any()


def test_coinciding_instances_have_finite_gradients() -> None:
    teacher = torch.randn(1, 3, 4, 2, 2)
    student = torch.randn(1, 1, 4, 2, 2).repeat(1, 3, 1, 1, 1).requires_grad_()  # all distances are 0
    loss = relation_loss(teacher, student, torch.ones(1, 3, dtype=torch.bool))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_nearly_coinciding_instances_keep_their_digits() -> None:
    # The product form |a|^2 + |b|^2 - 2ab is off by 100 % here: |a| is 1e4 times the distance.
    teacher, student = torch.randn(1, 4, 3, 2, 2), torch.randn(1, 4, 3, 2, 2) * 1e-3 + 10
    valid = torch.ones(1, 4, dtype=torch.bool)
    expected = naive_relation(teacher, student, valid)
    assert relation_loss(teacher, student, valid).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (100.0, 0.0), (1e-3, 10.0)])
def test_many_instances_are_compared_as_few_are(scale: float, offset: float) -> None:
    """The product form, with two instances that coincide, against the differences themselves in float64."""
    features = (torch.randn(2, MANY + 1, 12) * scale + offset).requires_grad_()
    features.data[0, 3] = features.data[0, 7]
    oracle = features.detach().double().requires_grad_()
    pairs = ~torch.eye(MANY + 1, dtype=torch.bool)
    pairs[3, 7] = pairs[7, 3] = False  # the slope of a norm is not defined at 0
    expected = (oracle[:, :, None] - oracle[:, None]).square().sum(-1).where(pairs, 1.0).sqrt().where(pairs, 0.0)
    found = distances(features)
    assert found.dtype == torch.float32
    assert found[0, 3, 7].item() == 0
    weight = torch.rand(2, MANY + 1, MANY + 1) * pairs
    torch.testing.assert_close((found * pairs).double(), expected, rtol=1e-5, atol=0)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(
        features.grad.double(), oracle.grad, rtol=1e-4, atol=1e-4 * float(oracle.grad.abs().max())
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_fp32(dtype: torch.dtype) -> None:
    teacher, student = (x.to(dtype) for x in make_crops())
    loss = relation_loss(teacher, student, VALID)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, relation_loss(teacher.float(), student.float(), VALID))


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)])
def test_half_precision_is_close_to_fp32(dtype: torch.dtype, rounding: float) -> None:
    teacher, student = make_crops()
    expected = relation_loss(teacher, student, VALID)
    loss = relation_loss(teacher.to(dtype), student.to(dtype), VALID)
    # Inputs rounded by r move a distance by at most r (|a| + |b|), and a normalised distance, which is about 1, by
    # twice that over phi; smooth L1 has a slope of at most 1, and both models are rounded.
    flat = torch.stack([teacher, student]).flatten(3)
    norms, distances = flat.norm(dim=-1), torch.cdist(flat, flat)
    bound = 2 * 2 * rounding * 2 * norms.max() / distances[distances > 0].min()
    assert abs(loss - expected) < bound


def test_large_half_precision_features_stay_finite() -> None:
    teacher, student = (torch.randn(2, 4, 3, 2, 2).sign().mul(300).half() for _ in range(2))
    student.requires_grad_()
    loss = relation_loss(teacher, student, torch.ones(2, 4, dtype=torch.bool))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_autocast_changes_nothing() -> None:
    teacher, student = make_crops()
    expected = relation_loss(teacher, student, VALID)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(relation_loss(teacher, student, VALID), expected)


def test_no_gradient_for_the_teacher() -> None:
    teacher, student = make_crops(requires_grad=True)
    teacher.requires_grad_()
    relation_loss(teacher, student, VALID).backward()
    assert teacher.grad is None


def test_unknown_reduction_is_an_error() -> None:
    with pytest.raises(ValueError, match="reduction=none"):
        relation_loss(*make_crops(), VALID, reduction="none")
