import pytest
import torch
from reference.boxes import iou, random_boxes
from torchvision.ops.poolers import LevelMapper

from gid_yolo.detectors import build_detector
from gid_yolo.distill import GIDLoss
from gid_yolo.distill.feature import plan_rois
from gid_yolo.distill.levels import LevelRules, levels_of_outputs, overlapping_predictions
from gid_yolo.ops.structures import Targets


@pytest.mark.parametrize(("cells", "anchors"), [([12, 4, 1], 9), ([12, 4, 1], 1), ([6], 3)])
def test_the_level_of_every_prediction_is_that_of_its_cell(cells: list[int], anchors: int) -> None:
    owner = torch.tensor([level for level, count in enumerate(cells) for _ in range(count * anchors)])  # (R,)
    indices = torch.arange(len(owner)).flip(0).view(1, -1)
    assert torch.equal(levels_of_outputs(indices, cells, len(owner)), owner.flip(0).view(1, -1))
    assert levels_of_outputs(indices[:, :0], cells, len(owner)).shape == (1, 0)


@pytest.mark.parametrize("kind", ["retina_nano", "fcos_nano"])
def test_predictions_are_ordered_as_the_rule_takes_them(kind: str) -> None:
    """The side of a prior is in proportion to its level's stride, whatever the order is said to be."""
    detector = build_detector(kind, 2).eval()
    features, raw = detector.raw(torch.zeros(1, 3, 64, 96))
    outputs = raw.logits.shape[1]
    cells = [x.shape[-2] * x.shape[-1] for x in features]
    level = levels_of_outputs(torch.arange(outputs)[None], cells, outputs)[0]
    sides = (raw.priors[:, 2:] - raw.priors[:, :2]).prod(-1).sqrt()  # (R,)
    strides = torch.tensor(detector.strides)[level]
    ratio = sides / strides  # RetinaNet's anchors: 2, 2 * 2^(1/3) and 2 * 2^(2/3) strides, of whole pixels
    assert (ratio.max() / ratio.min()).item() < 1.7  # 2^(2/3) and rounding; of a wrong level twice that
    assert level.unique().tolist() == list(range(len(features)))


@pytest.mark.parametrize("canonical", [112.0, 224.0])
def test_the_second_stage_reads_from_torchvisions_levels(canonical: float) -> None:
    detector = build_detector("frcnn_nano", 2, roi_canonical=canonical)
    boxes = random_boxes((2, 50), image=(800, 800), smallest=3.0, largest=700.0)
    boxes[:, :10] = random_boxes((2, 10), image=(800, 800), smallest=3.0, largest=50.0)
    mapper = LevelMapper(2, 5, canonical_scale=int(canonical), canonical_level=4)  # P2 to P5
    expected = torch.stack([mapper([image]) for image in boxes])
    assert expected.unique().tolist() == [0, 1, 2, 3]
    assert torch.equal(detector.roi_levels(boxes), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -10.0])
def test_a_box_without_a_size_is_read_from_the_finest_level(value: float) -> None:
    boxes = torch.tensor([[[0.0, 0.0, value, 500.0], [0.0, 0.0, 500.0, 500.0]]])
    assert build_detector("frcnn_nano", 2).roi_levels(boxes).tolist() == [[0, 3]]  # 500 px over 4 * 112


def test_a_given_level_is_taken_whatever_the_size() -> None:
    boxes = random_boxes((2, 6), image=(64, 64), smallest=4.0, largest=60.0)
    level = torch.arange(12).view(2, 6) % 3
    plan = plan_rois(boxes, (8, 16, 32), (64, 64), level)
    found = torch.cat([torch.full((len(rois),), i) for i, rois in enumerate(plan.rois)])[plan.restore]
    assert torch.equal(found, level.flatten())
    assert torch.equal(torch.cat(plan.rois)[plan.restore][:, 1:], boxes.flatten(0, 1))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"level": "anchor"}, "level=anchor must be one of detector, prediction, size"),
        ({"weighting": "pgd"}, "weighting=pgd must be one of uniform, score"),
    ],
)
def test_a_rule_that_does_not_exist_is_refused(setting: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        GIDLoss(4, 4, **setting)


def test_of_every_instance_the_prediction_that_overlaps_it_most() -> None:
    instances, predictions = (random_boxes((2, n), smallest=5.0) for n in (6, 40))
    instances[0, 0] = 0.0  # an empty place
    predictions[1, 7] = predictions[1, 3] = instances[1, 2]  # of equal ones the first
    found = overlapping_predictions(instances, predictions)
    for b in range(2):
        for k in range(6):
            ious = [iou(instances[b, k].tolist(), box) for box in predictions[b].tolist()]
            assert found[b, k] == ious.index(max(ious))
    assert found[1, 2] == 3
    assert overlapping_predictions(instances[:, :0], predictions).shape == (2, 0)
    assert overlapping_predictions(torch.zeros(1, 1, 4), torch.zeros(1, 3, 4)).tolist() == [[0]]  # 0 / 0 everywhere


@pytest.mark.parametrize("without", [{"types": "gt"}, {"aligned": False, "weights": {"response": 0.0}}])
def test_an_instance_without_a_prediction_goes_by_the_students_nearest(without: dict) -> None:
    detector = build_detector("retina_nano", 2).eval()
    features, raw = detector.raw(torch.rand(3, 3, 64, 96))
    asked = []
    rules = LevelRules(lambda indices: asked.append(indices) or torch.ones_like(indices))
    boxes = torch.tensor([[[20.0, 10.0, 60.0, 40.0]]]).expand(3, -1, -1)
    targets = Targets(boxes, torch.ones(3, 1, dtype=torch.long), torch.ones(3, 1, dtype=torch.bool))
    gid = GIDLoss(detector.fpn_channels, detector.fpn_channels, level="prediction", **without)
    settings = {"functions": detector, "strides": detector.strides, "image_size": (64, 96)}
    _, instances = gid(features, features, raw.detach(), raw, **settings, levels=rules, targets=targets)
    assert len(asked) == 1
    assert torch.equal(asked[0], overlapping_predictions(instances.boxes, raw.boxes))
    assert asked[0].any()
