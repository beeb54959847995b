import pytest
import torch
from reference.boxes import random_boxes
from reference.gism import naive_gi, naive_gism, naive_nms
from torchvision.ops import nms

from gid_yolo.distill import gism, select_general_instances
from gid_yolo.distill.gism import general_instances, gi_boxes, gi_scores
from gid_yolo.ops.structures import GeneralInstances, RawPredictions

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def make_case(batch: int, count: int, classes: int, *, largest: float = 60.0) -> Case:
    # torch.rand gives multiples of 2**-24, whose differences are exact in fp32: the oracle sees the same scores.
    shape = (batch, count, classes)
    boxes = random_boxes((batch, count), largest=largest), random_boxes((batch, count), largest=largest)
    return torch.rand(shape), torch.rand(shape), *boxes


def check(instances: GeneralInstances, case: Case, *, top_k: int, iou_threshold: float) -> None:
    expected = naive_gism(*case, top_k=top_k, iou_threshold=iou_threshold)
    batch = len(expected)
    assert instances.boxes.shape == (batch, top_k, 4)
    assert instances.scores.shape == instances.indices.shape == instances.valid.shape == (batch, top_k)
    for b, (indices, scores, boxes) in enumerate(expected):
        n = len(indices)
        assert instances.valid[b].tolist() == [True] * n + [False] * (top_k - n)
        assert instances.indices[b].tolist() == indices + [0] * (top_k - n)
        assert instances.scores[b].tolist() == scores + [0.0] * (top_k - n)
        assert instances.boxes[b].tolist() == boxes + [[0.0] * 4] * (top_k - n)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("batch", "count", "classes"), [(1, 40, 1), (3, 120, 5), (2, 60, 80)])
@pytest.mark.parametrize("largest", [8.0, 30.0, 90.0])  # from hardly any to heavy overlap
def test_equals_greedy_nms(seed: int, batch: int, count: int, classes: int, largest: float) -> None:
    torch.manual_seed(seed)
    case = make_case(batch, count, classes, largest=largest)
    top_k, iou_threshold = int(torch.randint(1, 16, ())), float(torch.rand(()))
    instances = select_general_instances(*case, top_k=top_k, iou_threshold=iou_threshold)
    check(instances, case, top_k=top_k, iou_threshold=iou_threshold)


@pytest.mark.parametrize("seed", range(5))
def test_equals_torchvision_nms(seed: int) -> None:
    torch.manual_seed(seed)
    case = make_case(2, 3000, 3, largest=25.0)
    instances = select_general_instances(*case, top_k=50)
    scores, boxes = gi_scores(*case[:2]), gi_boxes(*case)
    for b in range(2):
        expected = nms(boxes[b], scores[b], 0.3)[:50]
        assert torch.equal(instances.indices[b, : len(expected)], expected)
        assert int(instances.valid[b].sum()) == len(expected)


@pytest.mark.parametrize("seed", range(8))
def test_ties_go_to_the_lower_index(seed: int) -> None:
    torch.manual_seed(seed)
    case = make_case(3, 80, 2, largest=40.0)
    teacher, student = ((scores * 4).round() / 4 for scores in case[:2])  # five values: most scores are tied
    case = teacher, student, *case[2:]
    check(select_general_instances(*case, top_k=10), case, top_k=10, iou_threshold=0.3)


def test_duplicate_boxes_leave_the_first() -> None:
    case = make_case(1, 20, 1)
    same = case[2][:, :1].expand(1, 20, 4)
    scores = torch.full((1, 20, 1), 0.75), torch.full((1, 20, 1), 0.25)
    instances = select_general_instances(*scores, same, same, top_k=5)
    check(instances, (*scores, same, same), top_k=5, iou_threshold=0.3)
    assert instances.valid.tolist() == [[True, False, False, False, False]]
    assert instances.indices[0, 0] == 0


def test_boxes_without_area_and_outside_the_image() -> None:
    case = make_case(2, 40, 3)
    for boxes in case[2:]:
        boxes[:, :10, 2:] = boxes[:, :10, :2]  # points
        boxes[:, 10:15] = boxes[:, :5]  # the same points again: they do not overlap, having no area
        boxes[:, 15:20, 3] = boxes[:, 15:20, 1]  # lines
        boxes[:, 20:25] += 10_000
        boxes[:, 25:30] -= 10_000
    check(select_general_instances(*case, top_k=40), case, top_k=40, iou_threshold=0.3)


@pytest.mark.parametrize(("count", "top_k"), [(4, 10), (1, 3), (0, 3), (0, 0), (5, 0)])
def test_fewer_predictions_than_k(count: int, top_k: int) -> None:
    case = make_case(2, count, 3)
    check(select_general_instances(*case, top_k=top_k), case, top_k=top_k, iou_threshold=0.3)


def test_a_survivor_of_score_zero_is_valid() -> None:
    scores = torch.full((1, 2, 2), 0.5)
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 20, 30, 30]]])
    instances = select_general_instances(scores, scores, boxes, boxes, top_k=3)
    assert instances.valid.tolist() == [[True, True, False]]
    assert instances.scores.tolist() == [[0.0] * 3]


@pytest.mark.parametrize(("height", "kept"), [(5.0, 2), (5.5, 1)])
def test_only_more_than_the_threshold_is_removed(height: float, kept: int) -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, height]]])  # IoU height / 10
    scores = torch.tensor([[[0.9], [0.8]]]), torch.zeros(1, 2, 1)
    instances = select_general_instances(*scores, boxes, boxes, top_k=2, iou_threshold=0.5)
    assert int(instances.valid.sum()) == kept


def test_equation_1_takes_the_largest_difference_of_any_class_and_sign() -> None:
    teacher = torch.tensor([[[0.9, 0.1], [0.5, 0.5]]])
    student = torch.tensor([[[0.8, 0.7], [0.5, 0.25]]])
    torch.testing.assert_close(gi_scores(teacher, student), torch.tensor([[0.6, 0.25]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_equation_1_subtracts_in_fp32(dtype: torch.dtype) -> None:
    teacher, student = torch.rand(2, 30, 4).to(dtype), torch.rand(2, 30, 4).to(dtype)
    scores = gi_scores(teacher, student)
    boxes = torch.zeros(30, 4)
    for b in range(2):
        assert scores[b].tolist() == naive_gi(teacher[b], student[b], boxes, boxes)[0]


def test_equation_2_compares_each_models_own_best_class() -> None:
    # Higher by the teacher, by the student, equal (the student's box), equal through different classes (likewise).
    teacher = torch.tensor([[[0.9, 0.1], [0.2, 0.3], [0.5, 0.1], [0.1, 0.5]]])
    student = torch.tensor([[[0.1, 0.8], [0.4, 0.1], [0.5, 0.2], [0.5, 0.1]]])
    boxes_t, boxes_s = random_boxes((1, 4)), random_boxes((1, 4))
    expected = torch.stack([boxes_t[0, 0], boxes_s[0, 1], boxes_s[0, 2], boxes_s[0, 3]])
    assert torch.equal(gi_boxes(teacher, student, boxes_t, boxes_s)[0], expected)


def test_images_do_not_influence_each_other() -> None:
    case = make_case(4, 60, 3)
    together = select_general_instances(*case)
    for b in range(4):
        alone = select_general_instances(*(tensor[b : b + 1] for tensor in case))
        for name in ("boxes", "scores", "indices", "valid"):
            assert torch.equal(getattr(together, name)[b], getattr(alone, name)[0])


def test_no_graph() -> None:
    case = tuple(tensor.requires_grad_() for tensor in make_case(1, 10, 2))
    instances = select_general_instances(*case)
    assert not instances.boxes.requires_grad
    assert not instances.scores.requires_grad


@pytest.mark.parametrize("changed", range(4))
def test_shapes_that_differ_are_an_error(changed: int) -> None:
    case = list(make_case(2, 10, 3))
    case[changed] = case[changed][:, :9]
    with pytest.raises(ValueError, match="aligned"):
        select_general_instances(*case)


def test_classes_that_differ_are_an_error() -> None:
    case = make_case(2, 10, 3)
    with pytest.raises(ValueError, match="aligned"):
        select_general_instances(case[0], case[1][..., :2], *case[2:])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("what", ["scores", "boxes"])
def test_what_is_not_finite_is_never_an_instance(value: float, what: str) -> None:
    # The models' names are in the error after the step (`WatchedTrainer`): up to there nothing may break
    case = make_case(2, 60, 3)
    broken = torch.rand(2, 60) < 0.4
    broken[1] = True  # nothing is left of an image
    if what == "scores":
        case[1][broken] = value
    else:
        case[3][broken, 2] = value
        case[0][:], case[1][broken] = case[0] * 0.5, 0.9  # the student's boxes, and its largest differences
    instances = select_general_instances(*case)
    valid, indices = instances.valid, instances.indices
    left = (~broken[0]).nonzero()[:, 0]
    expected = naive_gism(*(x[:1, left] for x in case), top_k=10, iou_threshold=0.3)[0]
    assert indices[0][valid[0]].tolist() == [int(left[i]) for i in expected[0]]
    assert not valid[1].any()
    assert torch.isfinite(instances.boxes).all()
    assert torch.isfinite(instances.scores).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_boxes_of_a_whole_image_in_any_precision(dtype: torch.dtype) -> None:
    # 640 x 640 is over float16's largest number: the IoU is computed wide
    boxes = torch.tensor([[[0.0, 0, 640, 640], [0, 0, 640, 608], [0, 0, 640, 128]]]).to(dtype)
    scores = torch.tensor([[[0.75], [0.5], [0.25]]]).to(dtype)
    instances = select_general_instances(scores, torch.zeros_like(scores), boxes, boxes)
    assert instances.indices[0, :2].tolist() == [0, 2]
    assert instances.valid.sum() == 2


def test_float64_scores_are_not_rounded() -> None:
    scores = torch.tensor([[[0.5], [0.5 + 1e-12]]], dtype=torch.float64)
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 20, 30, 30]]])
    instances = select_general_instances(scores, torch.zeros_like(scores), boxes, boxes, top_k=1)
    assert instances.indices.tolist() == [[1]]


def test_negative_k_is_an_error() -> None:
    with pytest.raises(ValueError, match="top_k=-1"):
        select_general_instances(*make_case(1, 4, 2), top_k=-1)


def test_the_oracle_by_hand() -> None:
    # A overlaps B (removed), B overlaps C (kept, for B is gone): the chain that one-shot suppression gets wrong.
    boxes = [[0.0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]]  # IoU of neighbours 6 / 14, of A and C 2 / 18
    assert naive_nms([0.9, 0.8, 0.7], boxes, 0.3) == [0, 2]
    assert naive_nms([0.8, 0.9, 0.7], boxes, 0.3) == [1]
    assert naive_nms([0.5, 0.5, 0.9], boxes, 0.3) == [2, 0]


@pytest.mark.parametrize("chunk", [1, 640, 10**6])  # of scores: whole blocks of 64 rows
@pytest.mark.parametrize("classes", [1, 5])
def test_predictions_are_compared_in_parts_as_at_once(monkeypatch, chunk: int, classes: int) -> None:
    boxes = [random_boxes((2, 301), largest=30.0) for _ in range(2)]
    logits = [torch.randn(2, 301, classes) for _ in range(2)]
    logits[0][1, 7, 0] = float("nan")
    raws = [RawPredictions(x, y, y[0], lambda regression, _: regression) for x, y in zip(logits, boxes, strict=True)]
    expected = select_general_instances(*(x.scores for x in raws), *boxes, top_k=20)
    monkeypatch.setattr(gism, "CHUNK", chunk)
    for name, value in vars(general_instances(*raws, top_k=20, iou_threshold=0.3)).items():
        assert value is None if name == "types" else torch.equal(value, getattr(expected, name)), name
    assert expected.valid.all()
    assert 7 not in expected.indices[1].tolist()
