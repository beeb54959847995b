import pytest
import torch
from reference.boxes import random_boxes
from reference.comparators import naive_fine_grained, naive_fitnet, naive_imitation_mask, naive_mimicking
from torch import Tensor

from gid_yolo.distill.fine_grained import fine_grained_loss, imitation_mask
from gid_yolo.distill.fitnet import fitnet_loss
from gid_yolo.distill.mimicking import mimicking_loss
from gid_yolo.ops.structures import Targets

SHAPES = ((4, 6), (2, 3))
LOCATIONS = 4 * 6 + 2 * 3


def pyramids(batch: int = 3, channels: int = 5) -> tuple[list[Tensor], list[Tensor]]:
    """A teacher's maps, and a student's with a graph."""
    teacher = [torch.randn(batch, channels, *shape) for shape in SHAPES]
    return teacher, [torch.randn(batch, channels, *shape, requires_grad=True) for shape in SHAPES]


def objects(batch: int, count: int, real: Tensor) -> Targets:
    return Targets(random_boxes((batch, count), largest=50.0), torch.zeros(batch, count, dtype=torch.long), real)


def check(loss: Tensor, expected: Tensor, student: list[Tensor]) -> None:
    """Value and gradient equal the oracle's."""
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    got = torch.autograd.grad(loss, student, retain_graph=True)
    wanted = torch.autograd.grad(expected, student)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_fitnet_equals_the_loop() -> None:
    torch.manual_seed(0)
    teacher, student = pyramids()
    check(fitnet_loss(teacher, student), naive_fitnet(teacher, student), student)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("psi", [0.0, 0.5, 0.9, 1.0])
def test_the_imitation_mask_equals_the_loop(seed: int, psi: float) -> None:
    torch.manual_seed(seed)
    anchors = random_boxes((LOCATIONS * 3,), largest=60.0)
    real = torch.rand(4, 5) < 0.6
    real[0] = False  # an image without objects
    targets = objects(4, 5, real)
    mask = imitation_mask(anchors, targets, LOCATIONS, psi=psi)
    for b in range(4):
        boxes = targets.boxes[b][real[b]].tolist()
        assert mask[b].tolist() == naive_imitation_mask(anchors.tolist(), boxes, 3, psi)
    assert not mask[0].any()
    if psi == 1.0:
        assert not mask.any()  # nothing is over its own maximum


def test_the_imitation_mask_without_any_object() -> None:
    anchors = random_boxes((LOCATIONS,), largest=60.0)
    assert not imitation_mask(anchors, objects(2, 0, torch.zeros(2, 0, dtype=torch.bool)), LOCATIONS).any()


def test_fine_grained_equals_the_loop() -> None:
    torch.manual_seed(0)
    teacher, student = pyramids()
    mask = torch.rand(3, LOCATIONS) < 0.3
    mask[1] = False  # an image without objects
    check(fine_grained_loss(teacher, student, mask), naive_fine_grained(teacher, student, mask), student)


def test_mimicking_equals_the_loop() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(3, 6, 4, 3, 3), torch.randn(3, 6, 4, 3, 3, requires_grad=True)
    valid = torch.rand(3, 6) < 0.6
    valid[2] = False
    check(mimicking_loss(teacher, student, valid), naive_mimicking(teacher, student, valid), [student])


def test_nothing_to_imitate_is_exactly_zero_with_a_graph() -> None:
    teacher, student = pyramids()
    loss = fine_grained_loss(teacher, student, torch.zeros(3, LOCATIONS, dtype=torch.bool))
    assert loss.item() == 0
    loss.backward()
    assert not any(x.grad.any() for x in student)
    crops = torch.randn(2, 3, 4, 3, 3, requires_grad=True)
    loss = mimicking_loss(torch.randn_like(crops), crops, torch.zeros(2, 3, dtype=torch.bool))
    assert loss.item() == 0
    loss.backward()
    assert not crops.grad.any()


def test_identical_features_are_exactly_zero_with_no_gradient() -> None:
    teacher, _ = pyramids()
    student = [x.clone().requires_grad_() for x in teacher]
    crops = torch.randn(2, 3, 4, 3, 3)
    same = crops.clone().requires_grad_()
    losses = [
        fitnet_loss(teacher, student),
        fine_grained_loss(teacher, student, torch.ones(3, LOCATIONS, dtype=torch.bool)),
        mimicking_loss(crops, same, torch.ones(2, 3, dtype=torch.bool)),
    ]
    assert [loss.item() for loss in losses] == [0, 0, 0]
    assert not any(bool(g.any()) for g in torch.autograd.grad(sum(losses), [*student, same]))


def test_objects_outside_the_image_or_without_area_are_not_imitated() -> None:
    anchors = random_boxes((LOCATIONS,), largest=60.0)
    near = torch.tensor([20.0, 20, 60, 50])
    nowhere = torch.tensor([[900.0, 900, 950, 950], [-90.0, -90, -80, -80], [30, 30, 30, 30], [30, 30, 60, 30]])
    targets = Targets(nowhere[None], torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool))
    assert not imitation_mask(anchors, targets, LOCATIONS).any()
    boxes, valid = torch.cat([near[None], nowhere])[None], torch.ones(1, 5, dtype=torch.bool)
    alone = Targets(near[None, None], torch.zeros(1, 1, dtype=torch.long), valid[:, :1])
    together = Targets(boxes, torch.zeros(1, 5, dtype=torch.long), valid)
    expected = imitation_mask(anchors, alone, LOCATIONS)
    assert expected.any()
    assert torch.equal(imitation_mask(anchors, together, LOCATIONS), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_half_precision_features_stay_finite(dtype: torch.dtype) -> None:
    # 300 squared is beyond float16
    maps = [torch.full((1, 2, *shape), 300.0, dtype=dtype) for shape in SHAPES]
    zeros = [torch.zeros_like(x) for x in maps]
    assert fitnet_loss(maps, zeros).item() == 0.5 * 300**2
    assert fine_grained_loss(maps, zeros, torch.ones(1, LOCATIONS, dtype=torch.bool)).item() == 0.5 * 2 * 300**2
    crops = torch.full((1, 2, 3, 2, 2), 300.0, dtype=dtype)
    assert mimicking_loss(crops, torch.zeros_like(crops), torch.ones(1, 2, dtype=torch.bool)).item() == 0.5 * 300**2
