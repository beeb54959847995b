import io
import warnings

import pytest
import torch
from reference.boxes import iou, random_boxes
from torchvision.ops import nms

from gid_yolo.ops.nms import best_first, class_nms, grouped_nms


def naive_nms(boxes: list[list[float]], scores: list[float], threshold: float) -> set[int]:
    """Greedy NMS of one group, one pair at a time."""
    kept: list[int] = []
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        if all(iou(boxes[i], boxes[k]) <= threshold for k in kept):
            kept.append(i)
    return set(kept)


def make_groups(groups: int, count: int, share: float = 0.8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return random_boxes((groups, count)), torch.randn(groups, count), torch.rand(groups, count) < share


@pytest.mark.parametrize(("groups", "count"), [(1, 40), (6, 30), (30, 60)])  # beyond 1000 boxes torchvision loops
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
def test_equals_the_loop(groups: int, count: int, threshold: float) -> None:
    boxes, scores, valid = make_groups(groups, count)
    keep = grouped_nms(boxes, scores, valid, threshold)
    assert keep.dtype == torch.bool
    for g in range(groups):
        index = valid[g].nonzero()[:, 0]
        expected = naive_nms(boxes[g][index].tolist(), scores[g][index].tolist(), threshold)
        assert set(keep[g].nonzero()[:, 0].tolist()) == {int(index[i]) for i in expected}


@pytest.mark.parametrize("shape", [(3, 5), (3, 0), (0, 5)])
def test_nothing_valid(shape: tuple[int, int]) -> None:
    keep = grouped_nms(torch.rand(*shape, 4), torch.rand(shape), torch.zeros(shape, dtype=torch.bool), 0.5)
    assert keep.shape == shape
    assert not keep.any()


def test_invalid_boxes_do_not_suppress() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0]] * 3])
    keep = grouped_nms(boxes, torch.tensor([[0.9, 0.5, 0.4]]), torch.tensor([[False, True, True]]), 0.5)
    assert keep.tolist() == [[False, True, False]]


def test_many_groups_do_not_cost_accuracy() -> None:
    # Two boxes of 8 x 8 px that overlap by 4 x 8: IoU 1/3; the second shifted by 1/64 px more or less lies on either
    # side of the threshold. Moved apart by 640 px a group in float32, 1000 groups would leave 1/16 px.
    side = torch.where(torch.arange(450) % 2 == 0, -1.0, 1.0) / 64  # 900 boxes: torchvision moves groups apart
    first = torch.tensor([600.0, 600.0, 608.0, 608.0]).expand(450, 4)
    second = first + torch.stack([4 + side, 0 * side, 4 + side, 0 * side], dim=1)
    groups = torch.zeros(1000, 2, 4)
    groups[550:] = torch.stack([first, second], dim=1)
    valid = torch.zeros(1000, 2, dtype=torch.bool)
    valid[550:] = True
    keep = grouped_nms(groups, torch.tensor([0.9, 0.8]).expand(1000, 2), valid, 1 / 3)
    assert keep[550:, 0].all()
    assert torch.equal(keep[550:, 1], side > 0)  # moved away from the first


@pytest.mark.parametrize("count", [1, 5, 12, 20])
def test_best_first(count: int) -> None:
    scores, valid = torch.randn(4, 12), torch.rand(4, 12) < 0.6
    valid[2] = False
    index, found = best_first(scores, valid, count)
    assert index.shape == found.shape == (4, count)
    for b in range(4):
        expected = sorted((r for r in range(12) if valid[b, r]), key=lambda r: -scores[b, r])[:count]
        assert index[b].tolist() == expected + [0] * (count - len(expected))
        assert found[b].tolist() == [True] * len(expected) + [False] * (count - len(expected))


def test_best_first_drops_nan() -> None:
    index, found = best_first(torch.tensor([[1.0, float("nan"), 2.0]]), torch.ones(1, 3, dtype=torch.bool), 3)
    assert sorted(index[found].tolist()) == [0, 2]


class Suppress(torch.nn.Module):
    def forward(self, boxes: torch.Tensor, scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return grouped_nms(boxes, scores, valid, 0.4)


def test_exported_graph() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    file, names = io.BytesIO(), ["boxes", "scores", "valid"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Suppress(),
            make_groups(2, 10),
            file,
            dynamo=False,
            opset_version=17,
            input_names=names,
            dynamic_axes={name: {0: "groups", 1: "count"} for name in names},
        )
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for groups, count, share in ((2, 10, 0.8), (7, 90, 0.8), (3, 20, 0.0)):
        inputs = make_groups(groups, count, share)
        keep = session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})[0]
        assert torch.equal(torch.from_numpy(keep), grouped_nms(*inputs, 0.4))


def test_equals_torchvision_for_one_group() -> None:
    boxes, scores, _ = make_groups(1, 300)
    keep = grouped_nms(boxes, scores, torch.ones(1, 300, dtype=torch.bool), 0.5)
    assert set(keep[0].nonzero()[:, 0].tolist()) == set(nms(boxes[0], scores[0], 0.5).tolist())


def test_of_equal_scores_the_lower_index_comes_first() -> None:
    # As an untrained or dead part of a network gives them, at every place the same
    scores = torch.tensor([0.5, 0.1, 0.5, 0.9]).repeat(500)[None]
    index, found = best_first(scores, torch.ones_like(scores, dtype=torch.bool), 1500)
    order = sorted(range(2000), key=lambda i: (-scores[0, i].item(), i))
    assert index[0].tolist() == order[:1500]
    assert found.all()


def naive_class_nms(boxes, scores, min_score: float, threshold: float, most: int) -> list[list[float]]:
    """The rows of one image: each class by the loop above, then the best of all."""
    rows = []
    for label, of_class in enumerate(scores.tolist()):
        index = [i for i, score in enumerate(of_class) if score > min_score]
        kept = naive_nms([boxes[i].tolist() for i in index], [of_class[i] for i in index], threshold)
        rows += [[*boxes[index[k]].tolist(), of_class[index[k]], float(label)] for k in kept]
    return sorted(rows, key=lambda row: -row[4])[:most]


@pytest.mark.parametrize(("classes", "most"), [(1, 5), (3, 12), (4, 400)])
def test_class_nms_equals_the_loop(classes: int, most: int) -> None:
    boxes, scores = random_boxes((3, 40)), torch.rand(3, classes, 40)
    scores[1] *= 0.0  # an image without any
    found = class_nms(boxes, scores, min_score=0.3, iou_threshold=0.4, max_det=most)
    assert found.shape == (3, most, 6)
    for image in range(3):
        rows = torch.tensor(naive_class_nms(boxes[image], scores[image], 0.3, 0.4, most)).reshape(-1, 6)
        torch.testing.assert_close(found[image, : len(rows)], rows)
        assert not found[image, len(rows) :].any()


class Final(torch.nn.Module):
    def forward(self, boxes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return class_nms(boxes, scores, min_score=0.3, iou_threshold=0.4, max_det=20)


def test_boxes_beyond_the_image_leave_other_classes_alone() -> None:
    boxes = torch.tensor([[[540.0, 540.0, 640.0, 640.0], [-100.0, -100.0, 4.0, 4.0]]])
    scores = torch.tensor([[[0.9, 0.0], [0.0, 0.8]]])  # (B, C, R): each box of its own class
    found = class_nms(boxes, scores, min_score=0.5, iou_threshold=0.5, max_det=3)
    assert found[0, :, 4].tolist() == pytest.approx([0.9, 0.8, 0.0])
    empty = class_nms(boxes, 0 * scores, min_score=0.5, iou_threshold=0.5, max_det=3)
    assert not empty.any()


def test_class_nms_in_a_graph() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Final(),
            (random_boxes((2, 10)), torch.rand(2, 3, 10)),
            file,
            dynamo=False,
            opset_version=18,
            input_names=["boxes", "scores"],
            dynamic_axes={"boxes": {0: "batch", 1: "count"}, "scores": {0: "batch", 2: "count"}},
        )
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for batch, count, scale in ((2, 10, 1.0), (5, 90, 1.0), (1, 3, 1.0), (3, 20, 0.0)):
        boxes, scores = random_boxes((batch, count)), torch.rand(batch, 3, count) * scale
        found = session.run(None, {"boxes": boxes.numpy(), "scores": scores.numpy()})[0]
        assert found.shape == (batch, 20, 6)
        torch.testing.assert_close(torch.from_numpy(found), Final()(boxes, scores))
        assert found.any() == (scale > 0)
