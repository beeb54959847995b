"""Features of mean 0 and variance 1, against a loop and against Pearson's correlation."""

import pytest
import torch
from test_feature import VALID, make_crops, make_pyramid

from gid_yolo.distill import feature_loss
from gid_yolo.distill.standardize import standardized_crops, standardized_maps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_standardized_maps_equal_the_loop(dtype) -> None:
    pyramid = [(30 * (i + 1) * x + 7).to(dtype) for i, x in enumerate(make_pyramid(2, 3, 128, 160))]
    for level, found in zip(pyramid, standardized_maps(pyramid), strict=True):
        assert found.dtype == torch.float32
        for channel in range(3):
            numbers = level[:, channel].double()
            deviation = ((numbers - numbers.mean()).square().mean() + 1e-6).sqrt()
            expected = (numbers - numbers.mean()) / deviation
            torch.testing.assert_close(found[:, channel].double(), expected, rtol=1e-4, atol=1e-4)


def test_a_level_of_one_cell_is_zero_with_a_gradient() -> None:
    cell = torch.randn(1, 3, 1, 1, requires_grad=True)
    (found,) = standardized_maps([cell])
    assert (found == 0).all()
    found.square().sum().backward()
    assert (cell.grad == 0).all()


def test_maps_commute_with_scale_and_offset_of_a_level() -> None:
    pyramid = make_pyramid(2, 3, 128, 160)
    other = [x * 10.0 ** (i - 1) + i for i, x in enumerate(pyramid)]
    for x, y in zip(standardized_maps(pyramid), standardized_maps(other), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


def test_standardized_crops_equal_the_loop() -> None:
    crops = make_crops()[0] * torch.tensor([1.0, 100.0, 0.01]).view(3, 1, 1) + 7
    found = standardized_crops(crops, VALID)
    for channel in range(3):
        numbers = torch.stack([crops[b, k, channel].double() for b, k in VALID.nonzero().tolist()])
        mean = numbers.mean()
        deviation = ((numbers - mean).square().mean() + 1e-6).sqrt()
        expected = (numbers - mean) / deviation
        mine = torch.stack([found[b, k, channel].double() for b, k in VALID.nonzero().tolist()])
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)  # 7 +- 0.01 keeps three digits less
    assert (found[~VALID] == 0).all()


def test_the_distance_of_standardized_crops_is_that_of_their_correlations() -> None:
    teacher, student = make_crops(requires_grad=True)
    every = torch.ones_like(VALID)
    loss = feature_loss(standardized_crops(teacher, every), standardized_crops(student, every), every)
    flat = [x.detach().transpose(0, 2).flatten(1) for x in (teacher, student)]  # (C, N) of N = 4 x 4 x 2 x 2 places
    correlations = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*flat, strict=True)]
    # Of one channel: sum of (t - s)^2 over N places is N (1 + 1 - 2 r); a mean over 16 instances leaves 2 x 2 places
    torch.testing.assert_close(loss, 4 * sum(2 - 2 * r for r in correlations), rtol=1e-4, atol=0)


def test_standardized_crops_do_not_depend_on_scale_or_offset() -> None:
    teacher, _ = make_crops()
    torch.testing.assert_close(
        standardized_crops(1000 * teacher - 50, VALID), standardized_crops(teacher, VALID), rtol=1e-3, atol=1e-4
    )


def test_a_channel_that_does_not_vary_and_no_instances_are_zero_with_a_gradient() -> None:
    _, student = make_crops(requires_grad=True)
    still = student * torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1) + 5
    found = standardized_crops(still, VALID)
    assert (found[:, :, 1] == 0).all()
    found.square().sum().backward()
    assert torch.isfinite(student.grad).all()
    student.grad = None
    none = standardized_crops(student, torch.zeros_like(VALID))
    assert (none == 0).all()
    none.sum().backward()
    assert (student.grad == 0).all()
