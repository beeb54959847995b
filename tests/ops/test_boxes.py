import math

import pytest
import torch
from reference.boxes import centre_form, decode, encode, random_boxes
from torchvision.models.detection._utils import BoxCoder

from gid_yolo.ops.boxes import decode_deltas, encode_deltas, xywh_to_xyxy, xyxy_to_xywh

CODER = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))


def test_corners_and_centres() -> None:
    boxes = random_boxes((3, 5)).double()
    expected = [[centre_form(box) for box in image] for image in boxes.tolist()]
    torch.testing.assert_close(xyxy_to_xywh(boxes), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(xywh_to_xyxy(xyxy_to_xywh(boxes)), boxes)


def test_encode_equals_torchvision_and_the_formula() -> None:
    boxes, anchors = random_boxes((50,)), random_boxes((50,))
    deltas = encode_deltas(boxes, anchors)
    torch.testing.assert_close(deltas, CODER.encode_single(boxes, anchors), rtol=1e-5, atol=1e-5)
    expected = [encode(box, anchor) for box, anchor in zip(boxes.tolist(), anchors.tolist(), strict=True)]
    torch.testing.assert_close(deltas.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5)


def test_decode_equals_torchvision_and_the_formula_beyond_the_limit() -> None:
    anchors = random_boxes((60,))
    deltas = torch.randn(2, 60, 4) * 3  # the limit log(1000 / 16) = 4.1 is passed by some
    assert (deltas[..., 2:] > math.log(1000 / 16)).any()
    boxes = decode_deltas(deltas, anchors)
    for image in range(2):
        torch.testing.assert_close(boxes[image], CODER.decode_single(deltas[image], anchors), rtol=1e-5, atol=1e-3)
        expected = [decode(d, a) for d, a in zip(deltas[image].tolist(), anchors.tolist(), strict=True)]
        torch.testing.assert_close(
            boxes[image].double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-3
        )


def test_round_trip() -> None:
    boxes, anchors = random_boxes((4, 30)).double(), random_boxes((30,)).double()
    torch.testing.assert_close(decode_deltas(encode_deltas(boxes, anchors), anchors), boxes)


def test_boxes_without_area_have_finite_targets() -> None:
    deltas = encode_deltas(torch.zeros(1, 4), torch.tensor([[0.0, 0.0, 16.0, 32.0]]))
    expected = torch.tensor([[-0.5, -0.5, math.log(1e-3 / 16), math.log(1e-3 / 32)]])
    torch.testing.assert_close(deltas, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_deltas_decode_in_fp32(dtype: torch.dtype) -> None:
    anchors = random_boxes((20,), image=(640.0, 640.0), largest=300.0)
    deltas = torch.randn(1, 20, 4).to(dtype)
    boxes = decode_deltas(deltas, anchors)
    assert boxes.dtype == torch.float32
    assert torch.equal(boxes, decode_deltas(deltas.float(), anchors))


def test_gradients_in_float64() -> None:
    anchors = random_boxes((5,)).double()
    deltas = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: decode_deltas(d, anchors), deltas)
