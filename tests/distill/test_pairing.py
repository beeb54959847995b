import pytest
import torch
from reference.boxes import random_boxes
from reference.pairing import naive_pairs
from torch import Tensor

from gid_yolo.distill import select_general_instances
from gid_yolo.distill.pairing import pair_predictions

Case = tuple[Tensor, Tensor, Tensor, Tensor]


def make_case(batch: int, counts: tuple[int, int], classes: tuple[int, int]) -> Case:
    scores = [torch.rand(batch, r, c) for r, c in zip(counts, classes, strict=True)]
    return *scores, *(random_boxes((batch, r), largest=60.0) for r in counts)


def check(case: Case, **settings) -> None:
    pairs = pair_predictions(*case, **settings)
    for b in range(len(case[0])):
        expected = naive_pairs(*(x[b] for x in case), **settings)
        for got, wanted in zip(pairs, zip(*expected, strict=True), strict=True):
            assert got[b].tolist() == list(wanted)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("candidates", [7, 40, 500])  # fewer than either has, than one has, than none
@pytest.mark.parametrize("iou_threshold", [0.1, 0.5])
def test_equals_plain_loops(seed: int, candidates: int, iou_threshold: float) -> None:
    torch.manual_seed(seed)
    case = make_case(2, (60, 25), (3, 3))
    check(case, candidates=candidates, iou_threshold=iou_threshold)


def test_an_rpns_objectness_is_compared_with_the_largest_class() -> None:
    torch.manual_seed(0)
    case = make_case(2, (30, 20), (1, 4))
    scores = case[1].amax(-1, keepdim=True)
    for got, wanted in zip(pair_predictions(*case), pair_predictions(case[0], scores, *case[2:]), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("counts", [(0, 5), (5, 0)])
def test_one_model_predicts_nothing(counts: tuple[int, int]) -> None:
    case = make_case(2, counts, (3, 3))
    check(case, candidates=10, iou_threshold=0.5)


def test_instances_are_where_the_models_differ() -> None:
    # The teacher sees an object of class 0 that the student takes for class 1 from another anchor, and one that the
    # student overlooks; both see the third. Scores of equation 1: max(0.9, 0.8), 0.7 and 0.05.
    teacher = torch.tensor([[[0.9, 0.0], [0.7, 0.0], [0.6, 0.0]]])
    student = torch.tensor([[[0.0, 0.8], [0.65, 0.0]]])
    boxes = torch.tensor([[[0.0, 0, 10, 10], [50, 50, 60, 60], [100, 0, 120, 20]]])
    others = torch.tensor([[[0.0, 0, 10, 8], [100, 0, 120, 18]]])
    found = select_general_instances(*pair_predictions(teacher, student, boxes, others), top_k=5)
    assert found.valid.tolist() == [[True, True, True, False, False]]
    torch.testing.assert_close(found.scores[0, :3], torch.tensor([0.9, 0.7, 0.05]))
    # Equation 2: the box of the more confident model
    assert found.boxes[0, :3].tolist() == [boxes[0, 0].tolist(), boxes[0, 1].tolist(), others[0, 1].tolist()]


def test_equal_models_differ_nowhere() -> None:
    torch.manual_seed(1)
    scores, _, boxes, _ = make_case(2, (40, 40), (3, 3))
    teacher, student, *_ = pair_predictions(scores, scores, boxes, boxes, iou_threshold=1.0)
    assert torch.equal(teacher, student)


def test_a_nan_is_never_the_most_confident() -> None:
    case = make_case(1, (20, 20), (2, 2))
    case[0][0, 3] = float("nan")
    assert not torch.isnan(pair_predictions(*case, candidates=19)[0]).any()
