import math

import pytest
import torch
from reference.boxes import random_boxes
from reference.distill import smooth_l1
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from gid_yolo.ops.losses import box_regression_loss, focal_loss, giou_loss, mean_over_images, soft_bce


@pytest.mark.parametrize("beta", [0.0, 1 / 9, 1.0])
def test_box_regression_loss_equals_the_loop(beta: float) -> None:
    prediction, target = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    target[0, 0] = prediction[0, 0]
    expected = [
        [
            sum(smooth_l1(p, t, beta) if beta else abs(p - t) for p, t in zip(row_p, row_t, strict=True))
            for row_p, row_t in zip(image_p, image_t, strict=True)
        ]
        for image_p, image_t in zip(prediction.tolist(), target.tolist(), strict=True)
    ]
    loss = box_regression_loss(prediction, target, beta=beta)
    torch.testing.assert_close(loss.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert loss[0, 0] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_box_regression_loss_computes_in_fp32(dtype: torch.dtype, beta: float) -> None:
    prediction, target = (torch.randn(3, 4) * 1000).to(dtype), (torch.randn(3, 4) * 1000).to(dtype)
    loss = box_regression_loss(prediction, target, beta=beta)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, box_regression_loss(prediction.float(), target.float(), beta=beta))


def test_mean_over_images_equals_the_loop() -> None:
    losses, weight = torch.rand(5, 9), torch.rand(5, 9) > 0.5
    weight[1] = False
    weight[2] = True
    images = []
    for row, chosen in zip(losses.tolist(), weight.tolist(), strict=True):
        values = [value for value, keep in zip(row, chosen, strict=True) if keep]
        images.append(sum(values) / len(values) if values else 0.0)
    assert mean_over_images(losses, weight).item() == pytest.approx(sum(images) / len(images), rel=1e-6)


def test_mean_over_images_is_the_mean_of_single_images() -> None:
    losses, weight = torch.rand(4, 6), torch.rand(4, 6) > 0.5
    single = [mean_over_images(losses[b : b + 1], weight[b : b + 1]).item() for b in range(4)]
    assert mean_over_images(losses, weight).item() == pytest.approx(sum(single) / 4, rel=1e-6)


@pytest.mark.parametrize("shape", [(3, 5), (3, 0)])
def test_mean_over_images_of_nothing_is_zero_with_a_graph(shape: tuple[int, int]) -> None:
    losses = torch.full(shape, float("inf"), requires_grad=True)  # what does not count must not leak
    loss = mean_over_images(losses, torch.zeros(shape, dtype=torch.bool))
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(losses.grad, torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_giou_loss_equals_torchvisions(dtype: torch.dtype) -> None:
    prediction, target = random_boxes((3, 200)).to(dtype).requires_grad_(), random_boxes((3, 200)).to(dtype)
    with torch.no_grad():
        prediction[0, :5] = target[0, :5]  # equal
        prediction[0, 5:10] += 1000.0  # apart
        prediction[0, 10:15, 2:] = prediction[0, 10:15, :2]  # without area
        prediction[0, 15:20] = target[0, 15:20] = 0.0  # as padding is
    loss = giou_loss(prediction, target)
    expected = generalized_box_iou_loss(prediction.float(), target.float())
    assert loss.dtype == torch.float32
    assert loss.shape == (3, 200)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(x.sum(), prediction, retain_graph=True)[0] for x in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert loss[0, :5].abs().max() < 1e-6


@pytest.mark.parametrize("scale", [0.01, 1.0, 640.0])  # from a hundredth of a pixel to a whole image
def test_giou_loss_of_equal_boxes_is_exactly_zero(scale: float) -> None:
    boxes = (random_boxes((500,), image=(1.0, 1.0), smallest=0.5, largest=1.0) * scale).requires_grad_()
    loss = giou_loss(boxes, boxes.detach().clone())
    assert not loss.any()
    (gradient,) = torch.autograd.grad(loss.sum(), boxes)
    assert gradient.abs().max() * scale < 1e-6


def test_soft_bce_equals_the_loop() -> None:
    student, teacher = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    loss = soft_bce(student, teacher)
    for b in range(2):
        for r in range(4):
            expected = 0.0
            for s, t in zip(student[b, r].tolist(), teacher[b, r].tolist(), strict=True):
                p, q = 1 / (1 + math.exp(-s)), 1 / (1 + math.exp(-t))
                expected -= q * math.log(p) + (1 - q) * math.log(1 - p)
            assert loss[b, r].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.5, 0.0), (0.9, 1.5)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_focal_loss_equals_torchvision(alpha: float, gamma: float, scale: float) -> None:
    logits = (scale * torch.randn(2, 50, 7, dtype=torch.float64)).requires_grad_()
    labels, positive = torch.randint(7, (2, 50)), torch.rand(2, 50) < 0.3
    one_hot = torch.nn.functional.one_hot(labels, 7) * positive[..., None].double()
    expected = sigmoid_focal_loss(logits, one_hot, alpha=alpha, gamma=gamma).sum(-1)
    found = focal_loss(logits, labels, positive, alpha=alpha, gamma=gamma)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)  # softplus is its argument from 20 on
    ours, theirs = (torch.autograd.grad(x.sum(), logits)[0] for x in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
