import pytest
import torch
from reference.boxes import random_boxes
from reference.types import naive_type
from torch import Tensor

from gid_yolo.distill.types import TYPES, classify, count_types, ground_truth_instances, keep_types, parse_types
from gid_yolo.ops.structures import GeneralInstances, Targets


def instances_of(boxes: Tensor, valid: Tensor | None = None) -> GeneralInstances:
    batch, k = boxes.shape[:2]
    valid = torch.ones(batch, k, dtype=torch.bool) if valid is None else valid
    return GeneralInstances(boxes, torch.rand(batch, k), torch.arange(k).expand(batch, k), valid)


def targets_of(boxes: Tensor, valid: Tensor | None = None) -> Targets:
    valid = torch.ones(boxes.shape[:2], dtype=torch.bool) if valid is None else valid
    return Targets(boxes.where(valid[..., None], 0.0), torch.zeros_like(valid, dtype=torch.long), valid)


def names(types: Tensor | None) -> list[str | None]:
    return [TYPES[i] if i >= 0 else None for i in types.tolist()]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("objects", [1, 4, 12])
def test_equations_10_and_11_equal_the_loop(seed: int, objects: int) -> None:
    torch.manual_seed(seed)
    boxes, truth = random_boxes((3, 60), largest=60.0), random_boxes((3, objects), largest=90.0)
    real = torch.rand(3, objects) < 0.7
    found = classify(instances_of(boxes), targets_of(truth, real)).types
    for b in range(3):
        expected = [naive_type(box, truth[b][real[b]].tolist()) for box in boxes[b].tolist()]
        assert names(found[b]) == expected


@pytest.mark.parametrize(
    ("box", "name"),
    [
        ([0, 0, 100, 51], "pos"),  # IoU 0.51
        ([0, 0, 100, 50], "semi"),  # IoU 0.5 is not more than 0.5; all of it lies on the object
        ([0, 0, 40, 140], "semi"),  # IoU 4000 / 11600, IoP 100 / 140 = 0.714
        ([0, 0, 40, 150], None),  # IoP 0.667
        ([0, 0, 40, 330], None),  # IoP 0.303
        ([0, 0, 40, 340], "neg"),  # IoP 0.294
        ([200, 200, 240, 240], "neg"),
        ([50, 50, 50, 50], "neg"),  # without area, so without a share that is covered
    ],
)
def test_the_bounds(box: list[float], name: str | None) -> None:
    truth = torch.tensor([[[0.0, 0, 100, 100]]])
    found = classify(instances_of(torch.tensor([[box]], dtype=torch.float32)), targets_of(truth))
    assert names(found.types[0]) == [name]


def test_without_objects_all_are_negative() -> None:
    boxes = random_boxes((2, 5), largest=50.0)
    for truth in (torch.zeros(2, 0, 4), torch.zeros(2, 3, 4)):
        found = classify(instances_of(boxes), targets_of(truth, torch.zeros(truth.shape[:2], dtype=torch.bool)))
        assert names(found.types.flatten()) == ["neg"] * 10


def test_counts_leave_out_what_gism_did_not_find() -> None:
    truth = torch.tensor([[[0.0, 0, 100, 100]]] * 2)
    same, far = [0.0, 0, 100, 100], [300.0, 300, 310, 310]
    valid = torch.tensor([[True, True, True], [True, False, False]])
    found = classify(instances_of(torch.tensor([[same, far, far], [same, far, far]]), valid), targets_of(truth))
    # Two images: (1 + 1) / 2 positive, none semi-positive, (2 + 0) / 2 negative
    assert {key: value.item() for key, value in count_types(found).items()} == {"pos": 1.0, "semi": 0.0, "neg": 1.0}
    kept = keep_types(found, ("pos",))
    assert kept.valid.tolist() == [[True, False, False]] * 2
    assert not kept.boxes[~kept.valid].any()
    assert not kept.scores[~kept.valid].any()
    assert count_types(kept)["neg"] == 1.0  # of what GISM found, not of what is distilled


def test_types_together_are_all_but_the_ambiguous() -> None:
    torch.manual_seed(0)
    found = classify(instances_of(random_boxes((4, 80), largest=60.0)), targets_of(random_boxes((4, 6), largest=90.0)))
    single = [keep_types(found, (name,)).valid for name in TYPES]
    together = keep_types(found, TYPES).valid
    assert torch.equal(torch.stack(single).sum(0), together.long())
    assert torch.equal(together, found.types >= 0)
    assert not together.all()  # some are ambiguous


def test_the_ground_truth_as_instances() -> None:
    real = torch.tensor([[True, False], [True, True]])
    targets = targets_of(random_boxes((2, 2), largest=50.0), real)
    found = classify(ground_truth_instances(targets), targets)
    assert torch.equal(found.valid, real)
    assert torch.equal(found.boxes, targets.boxes)
    assert names(found.types[real]) == ["pos"] * 3


@pytest.mark.parametrize(
    ("text", "types"),
    [("all", None), ("gt", ("gt",)), ("pos", ("pos",)), ("neg+semi", ("neg", "semi")), ("pos+pos", ("pos",))],
)
def test_settings(text: str, types: tuple[str, ...] | None) -> None:
    assert parse_types(text) == types


@pytest.mark.parametrize("text", ["positive", "gt+pos", "", "pos+", "pos,neg"])
def test_settings_that_do_not_exist(text: str) -> None:
    with pytest.raises(ValueError, match=r"give all, gt, or some of pos, semi, neg"):
        parse_types(text)
