"""The gradients of the first step's report, in every precision."""

import math

import pytest
import torch
from torch import nn

from gid_yolo.engine.teacher_student import probe_terms


def test_gradients_too_small_for_half_precision() -> None:
    # d(mean) = 1 / N = 1e-5, times 1e-4: each of N elements is 1e-9, and fp16 ends at 6e-8
    count = 10**5
    features = [torch.ones(count, dtype=torch.float16, requires_grad=True)]
    term = features[0].float().mean() * 1e-4
    assert not torch.autograd.grad(term, features, retain_graph=True)[0].any()
    value, norm = probe_terms({"a": term}, features)["a"]
    assert value == pytest.approx(1e-4)
    assert norm == pytest.approx(1e-9 * math.sqrt(count), rel=1e-2)


def test_gradients_that_overflow_when_scaled() -> None:
    features = [torch.ones(4, dtype=torch.float16, requires_grad=True)]
    # Each element is 10; times 2^16 it would be over fp16's 65504
    assert probe_terms({"a": features[0].float().sum() * 10}, features)["a"] == (40.0, 20.0)


def test_what_is_not_finite_stays_so() -> None:
    features = [torch.ones(4, requires_grad=True)]
    assert math.isinf(probe_terms({"a": (features[0] * math.inf).sum()}, features)["a"][1])


def test_full_precision_is_unchanged() -> None:
    features = [torch.randn(3, 4, requires_grad=True), torch.randn(5, requires_grad=True)]
    term = features[0].square().sum() + features[1].exp().sum()
    grads = torch.autograd.grad(term, features, retain_graph=True)
    expected = float(torch.stack([g.norm() for g in grads]).norm())
    assert probe_terms({"a": term, "b": torch.ones(1, requires_grad=True).sum()}, features) == {
        "a": (term.item(), expected),
        "b": (1.0, 0.0),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_agrees_with_full_precision(dtype: torch.dtype) -> None:
    first, second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
    images = torch.rand(1, 3, 32, 32)
    norms = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            features = [first(images)]
            term = second(features[0]).float().square().mean() * 1e-4
        assert features[0].dtype == (dtype if enabled else torch.float32)
        norms.append(probe_terms({"a": term}, features)["a"][1])
    # Gradients are rounded to 2^-8 of themselves at worst
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)
    assert norms[1] > 0
