import math

import pytest
import torch
from reference.boxes import random_boxes
from reference.distill import naive_adapt, naive_feature, naive_level, naive_rois
from torchvision.ops import MultiScaleRoIAlign, roi_align

from gid_yolo.distill import feature, feature_loss
from gid_yolo.distill.feature import (
    Adaptation,
    PyramidAdaptation,
    RoIPlan,
    every_level,
    own_level,
    plan_rois,
    roi_features,
)
from gid_yolo.distill.gid import GIDLoss

STRIDES = (8, 16, 32, 64, 128)
VALID = torch.tensor([[True, True, True, True], [True, False, True, False], [True, False, False, False], [False] * 4])


def make_crops(*, requires_grad: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 4, 3, 2, 2), torch.randn(4, 4, 3, 2, 2).requires_grad_(requires_grad)


def make_pyramid(
    batch: int, channels: int, height: int, width: int, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    return [torch.randn(batch, channels, -(-height // s), -(-width // s)).to(dtype) for s in STRIDES]


@pytest.mark.parametrize("normalize", ["instance", "pixel"])
def test_equation_4_and_its_gradient_equal_the_loop(normalize: str) -> None:
    teacher, student = make_crops(requires_grad=True)
    oracle_student = student.detach().double().requires_grad_()
    expected = naive_feature(teacher, oracle_student, VALID, per_pixel=normalize == "pixel")
    loss = feature_loss(teacher, student, VALID, normalize=normalize)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(student.grad.double(), oracle_student.grad, rtol=1e-5, atol=1e-7)
    assert not student.grad[~VALID].any()


def test_batch_is_the_mean_of_its_images() -> None:
    teacher, student = make_crops()
    single = [feature_loss(teacher[b : b + 1], student[b : b + 1], VALID[b : b + 1]).item() for b in range(4)]
    assert feature_loss(teacher, student, VALID).item() == pytest.approx(sum(single) / 4, rel=1e-6)


def test_identical_features_are_exactly_zero() -> None:
    teacher, _ = make_crops()
    student = teacher.clone().requires_grad_()
    loss = feature_loss(teacher, student, VALID)
    assert loss.item() == 0
    loss.backward()
    assert not student.grad.any()


@pytest.mark.parametrize("k", [4, 0])
def test_no_valid_instance_is_exactly_zero_with_a_graph(k: int) -> None:
    teacher, student = torch.randn(2, k, 3, 2, 2), torch.randn(2, k, 3, 2, 2, requires_grad=True)
    loss = feature_loss(teacher, student, torch.zeros(2, k, dtype=torch.bool))
    assert loss.item() == 0
    loss.backward()
    assert not student.grad.any()


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)])
def test_half_precision(dtype: torch.dtype, rounding: float) -> None:
    teacher, student = make_crops()
    loss = feature_loss(teacher.to(dtype), student.to(dtype), VALID)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, feature_loss(teacher.to(dtype).float(), student.to(dtype).float(), VALID))
    # Each number is off by at most `rounding` of itself, so a sum of squares by 2 * |t - s| * (|t| + |s|) * rounding.
    bound = (2 * (teacher - student).abs() * (teacher.abs() + student.abs()) * rounding).flatten(2).sum(-1).max()
    assert abs(loss - feature_loss(teacher, student, VALID)) < bound


def test_large_half_precision_features_stay_finite() -> None:
    teacher, student = torch.full((1, 2, 3, 2, 2), 300.0).half(), torch.zeros(1, 2, 3, 2, 2).half()
    assert torch.isinf(torch.tensor(300.0).half() ** 2)
    loss = feature_loss(teacher, student, torch.ones(1, 2, dtype=torch.bool))
    assert loss.item() == 3 * 2 * 2 * 300.0**2


def test_autocast_changes_nothing() -> None:
    teacher, student = make_crops()
    expected = feature_loss(teacher, student, VALID)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(feature_loss(teacher, student, VALID), expected)


def test_unknown_normalize_is_an_error() -> None:
    with pytest.raises(ValueError, match="normalize=sum"):
        feature_loss(*make_crops(), VALID, normalize="sum")


@pytest.mark.parametrize(
    ("strides", "expected"),
    [
        # Levels 2 to 7 of the rule are strides 4 to 128
        ((8, 16, 32, 64, 128), [0, 0, 1, 2, 3, 4]),
        ((32, 32, 64), [0, 0, 0, 0, 2, 2]),  # torchvision's MobileNetV3: of equal ones the first
        ((8, 64), [0, 0, 0, 1, 1, 1]),
        ((8, 32), [0, 0, 0, 1, 1, 1]),  # 16 lies between: the first
    ],
)
def test_the_level_of_the_nearest_stride_is_taken(strides: tuple[int, ...], expected: list[int]) -> None:
    # In an image of 800 x 1333 px level k takes sides from 224 * 2^(k-4) to twice as much; 1.1 is inside
    sides = [224 * 2 ** (k - 4) * 1.1 for k in range(2, 8)]
    boxes = torch.tensor([[[0.0, 0.0, side, side] for side in sides]])
    plan = plan_rois(boxes, strides, (800, 1333))
    assert [len(rois) for rois in plan.rois] == [expected.count(level) for level in range(len(strides))]
    assert torch.equal(torch.cat(plan.rois)[plan.restore][:, 1:], boxes[0])
    nearest = [
        min(range(len(strides)), key=lambda i: abs(math.log2(strides[i]) - level))  # min takes the first
        for level in range(2, 8)
    ]
    assert nearest == expected


@pytest.mark.parametrize("strides", [STRIDES, (4, 8, 16, 32, 64), (8, 16, 32), (32, 32, 64)])
def test_levels_of_random_boxes_equal_the_loop(strides: tuple[int, ...]) -> None:
    size = (800, 1333)
    boxes = random_boxes((2, 200), image=size, smallest=4.0, largest=1300.0)
    plan = plan_rois(boxes, strides, size)
    levels = torch.tensor([naive_level(box, strides, size) for box in boxes.flatten(0, 1).tolist()])
    found = torch.cat([torch.full((len(rois),), i) for i, rois in enumerate(plan.rois)])[plan.restore]
    assert torch.equal(found, levels)


@pytest.mark.parametrize(("height", "width"), [(256, 320), (800, 1333), (96, 160)])
def test_roi_features_equal_one_box_at_a_time(height: int, width: int) -> None:
    boxes = random_boxes((2, 12), image=(height, width), smallest=2.0, largest=40.0)
    boxes[:, 6:] = random_boxes((2, 6), image=(height, width), smallest=40.0, largest=float(width))
    boxes[1, 3] = 0.0  # an invalid slot
    boxes[1, 4] += 10 * width  # outside the image
    plan = plan_rois(boxes, STRIDES, (height, width))
    levels = [naive_level(box, STRIDES, (height, width)) for box in boxes.flatten(0, 1).tolist()]
    assert [len(rois) for rois in plan.rois] == [levels.count(level) for level in range(5)]
    assert len(set(levels)) >= 3
    # Teacher and student share the plan whatever their channels and dtype
    for channels, dtype in ((3, torch.float32), (5, torch.float64)):
        pyramid = make_pyramid(2, channels, height, width, dtype)
        crops = roi_features(pyramid, plan, STRIDES, size=4)
        assert crops.shape == (2, 12, channels, 4, 4)
        expected = naive_rois(pyramid, boxes, STRIDES, (height, width), 4)
        torch.testing.assert_close(crops, expected, rtol=1e-5, atol=1e-5)


def test_roi_levels_equal_torchvisions_where_the_canonical_size_is_224() -> None:
    height, width = 800, 1333  # the image size for which the rule says 224
    boxes = random_boxes((2, 40), image=(height, width), smallest=5.0, largest=1200.0)
    pyramid = make_pyramid(2, 3, height, width)
    crops = roi_features(pyramid, plan_rois(boxes, STRIDES, (height, width)), STRIDES, size=5)

    pooler = MultiScaleRoIAlign([str(i) for i in range(5)], 5, 2, canonical_scale=224, canonical_level=4)
    # aligned=False there: half a cell of the box's own level apart, so the boxes are moved by half a stride
    levels = [[naive_level(box, STRIDES, (height, width)) for box in image] for image in boxes.tolist()]
    shift = torch.tensor([[STRIDES[level] / 2 for level in image] for image in levels])[..., None]
    expected = pooler({str(i): f for i, f in enumerate(pyramid)}, list(boxes - shift), [(height, width)] * 2)
    torch.testing.assert_close(crops.flatten(0, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("side", "level"), [(111.0, 0), (112.0, 0), (223.0, 0), (224.0, 1), (448.0, 2), (5000.0, 4)])
def test_level_of_a_square(side: float, level: int) -> None:
    plan = plan_rois(torch.tensor([[[0.0, 0, side, side]]]), STRIDES, (800, 1333))
    assert [len(rois) for rois in plan.rois] == [int(i == level) for i in range(5)]


def test_levels_scale_with_the_image() -> None:
    boxes = random_boxes((1, 60), image=(800, 1333), smallest=5.0, largest=1200.0)
    large, small = plan_rois(boxes, STRIDES, (800, 1333)), plan_rois(boxes / 4, STRIDES, (200, 1333 / 4))
    assert [len(rois) for rois in small.rois] == [len(rois) for rois in large.rois]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_boxes_that_are_not_finite_are_cropped_as_empty_ones(value: float) -> None:
    # RoIAlign itself reads outside of its map and ends the process
    boxes = random_boxes((2, 4), image=(64.0, 64.0), largest=60.0)
    broken, empty = boxes.clone(), boxes.clone()
    broken[0, 1, 2], empty[0, 1] = value, 0.0
    pyramid = [x.requires_grad_() for x in make_pyramid(2, 3, 64, 64)]
    crops = [roi_features(pyramid, plan_rois(x, STRIDES, (64, 64)), STRIDES, size=3) for x in (broken, empty)]
    assert torch.equal(*crops)
    crops[0].sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in pyramid if x.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_levels_of_half_precision_boxes(dtype: torch.dtype) -> None:
    # Their areas are over float16's largest number, and bfloat16 counts images only to 256
    boxes = torch.tensor([[[0.0, 0, 300, 300], [0, 0, 600, 600]]]).expand(300, 2, 4).to(dtype)
    half, full = plan_rois(boxes, STRIDES, (800, 1333)), plan_rois(boxes.float(), STRIDES, (800, 1333))
    assert all(torch.equal(a, b) for a, b in zip(half.rois, full.rois, strict=True))
    assert [len(rois) for rois in half.rois] == [0, 300, 300, 0, 0]


def test_roi_features_of_no_instance() -> None:
    crops = roi_features(make_pyramid(2, 3, 64, 64), plan_rois(torch.zeros(2, 0, 4), STRIDES, (64, 64)), STRIDES)
    assert crops.shape == (2, 0, 3, 10, 10)
    assert Adaptation(3, 7)(crops).shape == (2, 0, 7, 10, 10)


def test_gradient_of_the_crops_reaches_only_their_levels() -> None:
    pyramid = [x.requires_grad_() for x in make_pyramid(1, 2, 800, 1344)]
    boxes = torch.tensor([[[100.0, 100, 340, 340]]])
    level = naive_level(boxes[0, 0].tolist(), STRIDES, (800, 1344))
    roi_features(pyramid, plan_rois(boxes, STRIDES, (800, 1344)), STRIDES).sum().backward()
    assert [x.grad is not None and bool(x.grad.any()) for x in pyramid] == [i == level for i in range(5)]


@pytest.mark.parametrize("kernel", [1, 3])
def test_adaptation_is_linear_and_keeps_the_shape(kernel: int) -> None:
    adapt = Adaptation(3, 5, kernel)
    crops = torch.randn(2, 4, 3, 6, 6)
    assert adapt(crops).shape == (2, 4, 5, 6, 6)
    offset = adapt(torch.zeros_like(crops))
    torch.testing.assert_close(adapt(2 * crops) - offset, 2 * (adapt(crops) - offset))
    if kernel == 1:
        weight, bias = adapt.conv.weight[..., 0, 0], adapt.conv.bias
        torch.testing.assert_close(adapt(crops), naive_adapt(crops, weight, bias), rtol=1e-5, atol=1e-5)


def test_adaptation_commutes_with_roi_align() -> None:
    adapt = Adaptation(3, 5).double()
    pyramid = make_pyramid(2, 3, 256, 320, torch.float64)
    boxes = random_boxes((2, 6), image=(256.0, 320.0), smallest=20.0, largest=100.0).double()
    # Only where no sample lies outside the map, where RoIAlign reads 0 instead of the bias
    boxes = torch.cat([boxes[..., :2].clamp(40, 120), boxes[..., :2].clamp(40, 120) + 90], dim=-1)
    plan = plan_rois(boxes, STRIDES, (256, 320))
    maps = [adapt(x[:, None])[:, 0] for x in pyramid]
    torch.testing.assert_close(roi_features(maps, plan, STRIDES), adapt(roi_features(pyramid, plan, STRIDES)))


def test_the_teacher_gets_no_gradient() -> None:
    teacher, student = (x.requires_grad_() for x in make_crops())
    feature_loss(teacher, student, VALID).backward()
    assert teacher.grad is None
    assert student.grad.any()


def test_a_larger_kernel_reads_the_map_around_a_crop() -> None:
    """The mean of 3 x 3 cells of a map of ones is 1, up to the border of every crop inside it."""
    gid = GIDLoss(8, 12, adapt_kernel=3)
    with torch.no_grad():
        gid.adapt.conv.weight.fill_(1 / (8 * 9))
        gid.adapt.conv.bias.zero_()
    strides = (8, 16)
    pyramid = [torch.ones(1, 8, 256 // stride, 256 // stride) for stride in strides]
    boxes = torch.tensor([[[40.0, 40.0, 100.0, 90.0], [60.0, 50.0, 200.0, 190.0]]])
    level = torch.tensor([[0, 1]])
    crops = gid._adapted(pyramid, plan_rois(boxes, strides, (256, 256), level), strides)
    torch.testing.assert_close(crops, torch.ones(1, 2, 12, 10, 10))


def test_levels_of_differing_channels() -> None:
    boxes = random_boxes((2, 12), image=(256.0, 320.0), smallest=5.0, largest=250.0)
    plan = plan_rois(boxes, STRIDES, (256, 320))
    levels = [naive_level(box, STRIDES, (256, 320)) for box in boxes.flatten(0, 1).tolist()]
    assert len(set(levels)) >= 3
    narrow, wide = (2, 3, 4, 5, 6), (4, 3, 6, 5, 7)
    adapt = PyramidAdaptation(narrow, wide)
    pyramid = [make_pyramid(2, c, 256, 320)[i] for i, c in enumerate(narrow)]
    crops = roi_features(pyramid, plan, STRIDES, size=4, adapt=adapt).flatten(0, 1)
    assert crops.shape == (24, 7, 4, 4)
    for crop, box, level, image in zip(crops, boxes.flatten(0, 1), levels, [0] * 12 + [1] * 12, strict=True):
        stride, channels = STRIDES[level], wide[level]
        alone = roi_align(pyramid[level][image : image + 1], [box[None]], 4, 1 / stride, 2, True)
        torch.testing.assert_close(crop[:channels], adapt.convs[level](alone)[0], rtol=1e-5, atol=1e-5)
        assert not crop[channels:].any()


def test_the_rule_in_numbers() -> None:
    # A 112 px box in an image of a quarter of 800 x 1333's area is a 224 px box there: P4
    assert naive_level([0, 0, 113, 113], STRIDES, (400, 667)) == 1
    assert naive_level([0, 0, 111, 111], STRIDES, (400, 667)) == 0
    assert math.log2(STRIDES[1]) == 4


@pytest.mark.parametrize("adapted", [False, True])
def test_what_a_gpu_crops_is_what_a_cpu_crops(adapted: bool) -> None:
    size, boxes = (256, 320), random_boxes((2, 12), image=(256.0, 320.0), smallest=5.0, largest=250.0)
    boxes[0, 3] = -40.0  # outside the image on its own level too
    levels = torch.tensor([naive_level(box, STRIDES, size) for box in boxes.flatten(0, 1).tolist()])
    assert len(set(levels.tolist())) >= 3
    rois = torch.cat([torch.arange(2.0).repeat_interleave(12)[:, None], boxes.flatten(0, 1)], dim=1)
    adapt = PyramidAdaptation((3,) * 5, (4, 3, 6, 5, 7)) if adapted else None
    pyramid = [x.requires_grad_() for x in make_pyramid(2, 3, *size)]
    found = []
    for spread in (own_level, every_level):
        plan = RoIPlan(*spread(rois, levels, len(STRIDES)), (2, 12))
        crops = roi_features(pyramid, plan, STRIDES, size=4, adapt=adapt)
        weight = torch.linspace(-1, 1, crops.numel()).view_as(crops)
        parameters = [] if adapt is None else list(adapt.parameters())
        grads = torch.autograd.grad(
            (crops * weight).sum(), [*pyramid, *parameters], materialize_grads=True, allow_unused=True
        )
        found.append((crops, *grads))
    assert found[0][0].any()
    for own, every in zip(*found, strict=True):
        torch.testing.assert_close(own, every)
    assert [len(x) for x in plan.rois] == [24] * 5


def test_a_crowd_is_cropped_on_its_own_levels_alone(monkeypatch) -> None:
    monkeypatch.setattr(feature, "own_level", lambda rois, level, levels: ((), level))
    boxes = torch.zeros(2, 12, 4, device="meta")  # whose levels no host knows, as on a GPU
    assert [len(x) for x in plan_rois(boxes, STRIDES, (256, 320)).rois] == [24] * 5
    monkeypatch.setattr(feature, "MOST_EVERYWHERE", 23)
    assert plan_rois(boxes, STRIDES, (256, 320)).rois == ()
