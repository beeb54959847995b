import math

import pytest
import torch
from reference.boxes import area, random_boxes
from reference.fcos import (
    naive_centerness,
    naive_decode,
    naive_encode,
    naive_inside,
    naive_match,
    naive_priors,
    torchvision_matches,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from gid_yolo.ops.anchors import cell_anchors, grid_anchors
from gid_yolo.ops.assign import BACKGROUND
from gid_yolo.ops.points import (
    centerness_target,
    decode_log_ltrb,
    decode_ltrb,
    encode_ltrb,
    match_points,
    points_inside,
)

SIZE = (192, 256)


def make_priors(strides: tuple[int, ...] = (8, 16, 32, 64, 128)) -> tuple[torch.Tensor, list[int]]:
    priors, counts = naive_priors(*SIZE, strides)
    return torch.tensor(priors), counts


def make_images(counts: list[int]) -> list[torch.Tensor]:
    """Boxes of sizes for all levels, in random order."""
    sides = [(4.0, 60.0), (70.0, 120.0), (140.0, 240.0), (270.0, 500.0), (700.0, 1000.0)]
    boxes = torch.stack([random_boxes((sum(counts),), image=SIZE, smallest=a, largest=b) for a, b in sides])
    chosen = torch.randint(0, len(sides), (sum(counts),))
    return list(boxes[chosen, torch.arange(sum(counts))].split(counts))


def pad(images: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    most = max(map(len, images))
    boxes, valid = torch.zeros(len(images), most, 4), torch.zeros(len(images), most, dtype=torch.bool)
    for b, image in enumerate(images):
        boxes[b, : len(image)], valid[b, : len(image)] = image, True
    return boxes, valid


@pytest.mark.parametrize("radius", [1.5, 1.0])
@pytest.mark.parametrize("seed", range(8))
def test_equals_torchvision(seed: int, radius: float) -> None:
    torch.manual_seed(seed)
    priors, counts = make_priors()
    images = make_images([0, 1, 9, 30])
    matched = match_points(priors, *pad(images), radius=radius)
    for row, expected in zip(matched, torchvision_matches(priors, counts, images, radius), strict=True):
        assert torch.equal(row, expected)
    assert all((level >= 0).any() for level in matched.split(counts, dim=1))


@pytest.mark.parametrize(("low", "high"), [(4.0, 8.0), (2.0, 4.0), (1.0, 6.0)])
@pytest.mark.parametrize("radius", [1.5, math.inf])
def test_equals_the_loop(radius: float, low: float, high: float) -> None:
    priors, _ = make_priors()
    images = make_images([12, 0, 5])
    images[0] = images[0].round()  # points on the sides and in the very centre of boxes
    matched = match_points(priors, *pad(images), radius=radius, level_ranges=(low, high))
    for row, boxes in zip(matched, images, strict=True):
        expected = naive_match(priors.double().tolist(), boxes.double().tolist(), radius=radius, low=low, high=high)
        assert row.tolist() == expected
    assert (matched[0] >= 0).any()


def test_the_smallest_of_several_boxes_wins_and_the_first_of_equals() -> None:
    priors = torch.tensor([[12.0, 12, 20, 20]])  # the point (16, 16)
    wide, small = [0.0, 0, 32, 40], [2.0, 2, 30, 30]
    for boxes, expected in [([wide, small], 1), ([small, wide], 0), ([wide, wide], 0), ([wide, small, small], 1)]:
        assert match_points(priors, *pad([torch.tensor(boxes)])).tolist() == [[expected]]
    boxes, valid = pad([torch.tensor([wide, small])])
    valid[0, 1] = False  # the smaller one is padding
    assert match_points(priors, boxes, valid).tolist() == [[0]]


def test_areas_that_torchvision_cannot_tell_apart() -> None:
    # The documented exception: torchvision compares 1e8 - area in float32, whose steps there are 8 square pixels.
    priors = torch.tensor([[12.0, 12, 20, 20]])
    boxes = torch.tensor([[6.0, 6, 26, 26.2], [6.0, 6, 26, 26]])  # 404 and 400
    assert torchvision_matches(priors, [1], [boxes])[0].tolist() == [0]
    assert match_points(priors, *pad([boxes])).tolist() == [[1]]


def test_bounds_are_exclusive() -> None:
    # The point (64, 64) on the stride-8 prior, with a finer and a coarser one far away that make its level the middle:
    # max(l, t, r, b) must lie in (32, 64), the offset from the centre under 12.
    priors = torch.tensor([[60.0, 60, 68, 68], [-902, -902, -898, -898], [-908, -908, -892, -892]])
    for box, expected in [
        ([32.0, 32, 96, 96], BACKGROUND),  # 32 on all sides
        ([31.0, 32, 96, 96], 0),
        ([0.0, 0, 128, 128], BACKGROUND),  # 64
        ([1.0, 1, 127, 127], 0),
        ([30.0, 30, 122, 98], BACKGROUND),  # centre at 76, 12 px off
        ([30.0, 30, 120, 98], 0),  # centre at 75
        ([64.0, 30, 100, 98], BACKGROUND),  # the point is on the left side
    ]:
        matched = match_points(priors, *pad([torch.tensor([box])]))
        assert matched[0, 0].item() == expected
        assert naive_match(priors.tolist(), [box])[0] == expected


@pytest.mark.parametrize("strides", [(8,), (16, 32)])
def test_few_levels(strides: tuple[int, ...]) -> None:
    priors, counts = make_priors(strides)
    images = make_images([6, 2])
    for row, expected in zip(
        match_points(priors, *pad(images)), torchvision_matches(priors, counts, images), strict=True
    ):
        assert torch.equal(row, expected)


@pytest.mark.parametrize("offset", [0.1, 0.3, -0.2])
def test_points_whose_coordinates_are_rounded_have_their_levels(offset: float) -> None:
    strides = (8, 16, 32)
    features = [torch.zeros(1, 1, 320 // s, 320 // s) for s in strides]
    cells = [cell_anchors([s], [1.0]) + offset * s for s in strides]
    priors = grid_anchors(torch.stack(cells), features, strides)
    sides = priors[:, 2] - priors[:, 0]
    assert len(sides.unique()) > 3  # so that it tells
    boxes = torch.tensor([[[100.0, 100.0, 115.0, 120.0], [10.0, 10.0, 300.0, 290.0]]])
    matched = match_points(priors, boxes, torch.ones(1, 2, dtype=torch.bool))[0]
    level = torch.repeat_interleave(torch.arange(3), torch.tensor([x.shape[2] * x.shape[3] for x in features]))
    assert level[matched == 0].unique().tolist() == [0]  # 20 px: under 8 strides of the finest
    assert level[matched == 1].unique().tolist() == [2]  # 290 px: over 8 strides of the middle one, 128 px


@pytest.mark.parametrize("size", [1, 300, 10**9])
def test_blocks_of_boxes_change_nothing(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    priors = random_boxes((150,), smallest=8.0, largest=8.0)
    priors[:, 2:] = priors[:, :2] + 8
    boxes, valid = random_boxes((2, 7), largest=60.0), torch.rand(2, 7) < 0.7
    boxes[:, 3] = boxes[:, 2]  # of equals the first, of whatever block
    expected = match_points(priors, boxes, valid, radius=3.0), points_inside(priors, boxes, valid)
    monkeypatch.setattr("gid_yolo.ops.blocks.BLOCK", size)
    assert torch.equal(match_points(priors, boxes, valid, radius=3.0), expected[0])
    assert torch.equal(points_inside(priors, boxes, valid), expected[1])
    assert (expected[0] >= 0).any()


def test_padding_changes_nothing() -> None:
    priors, _ = make_priors()
    boxes, valid = pad(make_images([9]))
    expected, inside = match_points(priors, boxes, valid), points_inside(priors, boxes, valid)
    perfect = torch.tensor([[[40.0, 40, 56, 56]]])  # where the padded slot holds a box, and where it comes first
    no = torch.zeros(1, 1, dtype=torch.bool)
    more = torch.cat([boxes, perfect], dim=1), torch.cat([valid, no], dim=1)
    before = torch.cat([perfect, boxes], dim=1), torch.cat([no, valid], dim=1)
    assert torch.equal(match_points(priors, *more), expected)
    assert torch.equal(match_points(priors, *before), expected + (expected >= 0))
    assert torch.equal(points_inside(priors, *more), inside)
    assert torch.equal(points_inside(priors, *before), inside)


def test_no_box_in_the_batch_and_boxes_without_area() -> None:
    priors, _ = make_priors()
    empty = torch.zeros(3, 0, 4), torch.zeros(3, 0, dtype=torch.bool)
    flat = torch.tensor([[[16.0, 16, 16, 16], [8, 8, 40, 8], [40, 40, 8, 8]]]), torch.ones(1, 3, dtype=torch.bool)
    for boxes, valid in (empty, flat):
        matched = match_points(priors, boxes, valid)
        assert matched.shape == (len(boxes), len(priors))
        assert matched.dtype == torch.long
        assert (matched == BACKGROUND).all()
        inside = points_inside(priors, boxes, valid)
        assert inside.shape == matched.shape
        assert not inside.any()


def test_points_inside_equals_the_loop() -> None:
    priors, counts = make_priors()
    images = make_images([4, 0, 7])
    images[0] = images[0].round()
    mask = points_inside(priors, *pad(images))
    for row, boxes in zip(mask, images, strict=True):
        assert row.tolist() == naive_inside(priors.tolist(), boxes.double().tolist())
    assert all(level.any() for level in mask.split(counts, dim=1))
    positive = match_points(priors, *pad(images)) >= 0
    assert (mask | ~positive).all()  # every positive point is inside
    assert (mask & ~positive).any()


def test_coding_equals_the_loop_and_inverts() -> None:
    priors, _ = make_priors()
    boxes = random_boxes((2, len(priors)), image=SIZE, smallest=1.0, largest=200.0)
    codes = encode_ltrb(boxes, priors)
    for r in range(0, len(priors), 53):
        prior, box = priors[r].tolist(), boxes[1, r].tolist()
        assert codes[1, r].tolist() == pytest.approx(naive_encode(box, prior), rel=1e-5, abs=1e-5)
        decoded = decode_ltrb(codes[1, r], priors[r]).tolist()
        assert decoded == pytest.approx(naive_decode(naive_encode(box, prior), prior), rel=1e-5, abs=1e-3)
    torch.testing.assert_close(decode_ltrb(codes, priors), boxes, rtol=1e-5, atol=1e-3)


def test_logarithms_of_pixels_are_decoded() -> None:
    priors, _ = make_priors()
    logs = torch.randn(2, len(priors), 4) * 2
    boxes = decode_log_ltrb(logs, priors)
    for r in range(0, len(priors), 53):
        side = float(priors[r, 2] - priors[r, 0])
        expected = naive_decode([math.exp(x) / side for x in logs[1, r].tolist()], priors[r].tolist())
        assert boxes[1, r].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-3)
    assert torch.isfinite(decode_log_ltrb(torch.full((1, 4), 500.0), priors[:1])).all()
    half = logs.half()
    assert torch.equal(decode_log_ltrb(half, priors), decode_log_ltrb(half.float(), priors))


def test_centerness_equals_the_loop() -> None:
    priors, _ = make_priors()
    boxes = random_boxes((len(priors),), image=SIZE, smallest=20.0, largest=400.0)
    expected = [naive_centerness(p, b) for p, b in zip(priors.double().tolist(), boxes.double().tolist(), strict=True)]
    target = centerness_target(boxes, priors)
    assert target.tolist() == pytest.approx(expected, abs=1e-5)
    assert sum(value > 0 for value in expected) > 20
    # 4 px from the left of 16, 8 of 16 from the top: sqrt(4/12 * 8/8)
    assert centerness_target(torch.tensor([0.0, 0, 16, 16]), torch.tensor([0.0, 4, 8, 12])).item() == pytest.approx(
        math.sqrt(1 / 3)
    )


def test_centerness_is_finite_everywhere() -> None:
    priors = torch.tensor([[-4.0, -4, 4, 4], [12, 12, 20, 20]])
    for box in ([0.0, 0, 0, 0], [0.0, 0, 32, 0], [16.0, 16, 16, 16], [100.0, 100, 90, 90], [0.0, 0, 1e-38, 1e-38]):
        target = centerness_target(torch.tensor(box), priors)
        assert torch.isfinite(target).all()
        assert ((target >= 0) & (target <= 1)).all()
        assert area(box) > 0 or not target.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_fp32(dtype: torch.dtype) -> None:
    priors, _ = make_priors()
    boxes, valid = pad([image.to(dtype).float() for image in make_images([7, 3])])
    half, code = boxes.to(dtype), torch.rand(2, len(priors), 4).to(dtype)
    assert (boxes[..., 2:] - boxes[..., :2]).prod(-1).max() > torch.finfo(torch.float16).max
    assert torch.equal(match_points(priors, half, valid), match_points(priors, boxes, valid))
    assert torch.equal(points_inside(priors, half, valid), points_inside(priors, boxes, valid))
    for function, one, other in (
        (encode_ltrb, half[:, :1], boxes[:, :1]),
        (decode_ltrb, code, code.float()),
        (centerness_target, half[:, :1], boxes[:, :1]),
    ):
        result = function(one, priors)
        assert result.dtype == torch.float32
        assert torch.equal(result, function(other, priors))


def test_nothing_waits_for_the_device() -> None:
    # A fake tensor has no values: whatever copies one to the host, or has a shape that depends on one, raises.
    with FakeTensorMode():
        priors, boxes, valid = torch.rand(50, 4), torch.rand(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)
        assert match_points(priors, boxes, valid).shape == (2, 50)
        assert points_inside(priors, boxes, valid).shape == (2, 50)
        assert centerness_target(boxes, priors[:5]).shape == (2, 5)
        with pytest.raises(RuntimeError):
            boxes[valid]
