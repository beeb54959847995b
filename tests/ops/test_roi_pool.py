import sys

import pytest
import torch
from reference.boxes import random_boxes
from torch._subclasses import FakeTensorMode
from torchvision.ops import MultiScaleRoIAlign, roi_align

from gid_yolo.ops.roi_pool import pyramid_roi_align, roi_crops, roi_levels

HEIGHT, WIDTH = 128, 192


def make_pyramid(strides: tuple[int, ...], batch: int, channels: int = 3) -> list[torch.Tensor]:
    return [torch.randn(batch, channels, HEIGHT // s, WIDTH // s).requires_grad_() for s in strides]


def torchvision_crops(
    features: list[torch.Tensor], boxes: torch.Tensor, canonical: float, size: int = 7
) -> torch.Tensor:
    named = {str(i): x for i, x in enumerate(features)}
    pool = MultiScaleRoIAlign(list(named), size, 2, canonical_scale=canonical)
    return pool(named, list(boxes), [(HEIGHT, WIDTH)] * len(boxes))


@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (8, 16), (32, 32), (16,)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("canonical", [224, 56])
def test_equals_torchvision(strides: tuple[int, ...], batch: int, canonical: int) -> None:
    features = make_pyramid(strides, batch)
    boxes = random_boxes((batch, 40), image=(HEIGHT, WIDTH), smallest=1.0, largest=220.0)
    crops = pyramid_roi_align(features, boxes, strides, canonical_size=canonical)
    assert crops.shape == (batch * 40, 3, 7, 7)
    expected = torchvision_crops(features, boxes, canonical)
    torch.testing.assert_close(crops, expected, rtol=1e-5, atol=1e-5)

    weight = torch.randn_like(crops)
    ours = torch.autograd.grad((crops * weight).sum(), features, allow_unused=True)
    theirs = torch.autograd.grad((expected * weight).sum(), features, allow_unused=True)
    for gradient, other, feature in zip(ours, theirs, features, strict=True):
        zero = torch.zeros_like(feature)
        torch.testing.assert_close(
            zero if gradient is None else gradient, zero if other is None else other, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 7, 10])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_crops_of_a_map_equal_torchvision(aligned: bool, samples: int, size: int, layout: torch.memory_format) -> None:
    feature = torch.randn(3, 5, 12, 9, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    low = torch.rand(60, 2) * 140 - 30  # of a map of 96 x 72 px: inside, across its borders and beyond them
    sides = torch.rand(60, 2) * torch.tensor([1.0, 20.0, 90.0]).repeat(20)[:, None]
    rois = torch.cat([torch.randint(3, (60, 1)).double(), low, low + sides], dim=1)
    crops = roi_crops(feature, rois, size, stride=8, samples=samples, aligned=aligned)
    expected = roi_align(feature, rois, size, 1 / 8, samples, aligned)
    assert expected.eq(0).flatten(1).all(1).any()  # one is outside
    torch.testing.assert_close(crops, expected)
    weight = torch.randn_like(crops)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), feature)[0] for x in (crops, expected))
    torch.testing.assert_close(ours, theirs)


def test_crops_of_no_boxes_and_of_no_number() -> None:
    feature = torch.randn(2, 5, 12, 9).requires_grad_()
    crops = roi_crops(feature, torch.zeros(0, 5), 7, stride=8, samples=2, aligned=True)
    assert crops.shape == (0, 5, 7, 7)
    crops.sum().backward()
    assert feature.grad.eq(0).all()
    rois = torch.tensor([[1.0, float("nan"), 0.0, 9.0, 9.0], [0.0, 0.0, 0.0, float("inf"), 9.0]])
    assert roi_crops(feature, rois, 7, stride=8, samples=2, aligned=True).eq(0).all()  # nothing is read


def test_levels_of_the_paper() -> None:
    # k = floor(4 + log2(side / 224)): 224 px is of P4 (stride 16), half of it of P3, within P2 and P5
    sides = torch.tensor([1.0, 55.9, 111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 2000.0])
    boxes = torch.stack([0 * sides, 0 * sides, sides, sides], dim=1)
    assert roi_levels(boxes, (4, 8, 16, 32)).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert roi_levels(boxes[5] * (1 - 1e-7), (4, 8, 16, 32)) == 2  # a rounding error below 224 px


def test_padding_gives_finite_crops() -> None:
    features = make_pyramid((4, 8), 2)
    crops = pyramid_roi_align(features, torch.zeros(2, 3, 4), (4, 8))
    assert torch.isfinite(crops).all()
    crops.sum().backward()
    assert torch.isfinite(features[0].grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_coordinates(dtype: torch.dtype) -> None:
    features = [x.to(dtype) for x in make_pyramid((4, 8), 2)]
    boxes = random_boxes((2, 30), image=(HEIGHT, WIDTH), smallest=20.0, largest=90.0)
    crops = pyramid_roi_align(features, boxes, (4, 8))
    expected = pyramid_roi_align([x.float() for x in features], boxes, (4, 8))
    assert crops.dtype == dtype
    assert torch.equal(crops, expected.to(dtype))


def test_only_valid_boxes_are_cropped() -> None:
    features = make_pyramid((4, 8, 16), 2)
    boxes = random_boxes((2, 30), image=(HEIGHT, WIDTH), smallest=1.0, largest=220.0)
    every = pyramid_roi_align(features, boxes, (4, 8, 16), canonical_size=56)
    for share in (0.5, 0.0):
        valid = torch.rand(2, 30) < share
        crops = pyramid_roi_align(features, boxes, (4, 8, 16), canonical_size=56, valid=valid)
        assert torch.equal(crops, every[valid.flatten()])


def test_a_gpu_has_the_operator_where_deterministic_algorithms_are_asked_for(monkeypatch) -> None:
    module = sys.modules["torchvision.ops.roi_align"]  # whose function has the module's name
    monkeypatch.setattr(module, "is_compile_supported", lambda device: True)
    monkeypatch.setattr(module, "_roi_align", lambda *_: pytest.fail("compiled"))
    torch.use_deterministic_algorithms(True, warn_only=True)  # as Ultralytics does
    try:
        with FakeTensorMode():  # shapes alone, of tensors on a GPU that need not be there
            feature, rois = torch.empty(2, 5, 12, 9, device="cuda"), torch.empty(4, 5, device="cuda")
            with pytest.raises(pytest.fail.Exception, match="compiled"):
                roi_align(feature, rois, 7, 1 / 8, 2, True)
            crops = roi_crops(feature, rois, 7, stride=8, samples=2, aligned=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert (crops.shape, crops.device.type) == ((4, 5, 7, 7), "cuda")
