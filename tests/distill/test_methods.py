from types import SimpleNamespace

import pytest
import torch

from gid_yolo.detectors import build_detector
from gid_yolo.distill import GIDLoss, fitnet
from gid_yolo.distill.feature import plan_rois, roi_features
from gid_yolo.distill.fine_grained import fine_grained_loss, imitation_mask
from gid_yolo.distill.levels import LevelRules
from gid_yolo.distill.methods import Distillation, FineGrained, FitNet, Mimicking, parse_methods
from gid_yolo.distill.mimicking import mimicking_loss
from gid_yolo.ops.structures import Targets

SIZE = (64, 96)


@pytest.fixture(scope="module")
def scene() -> SimpleNamespace:
    """Two Faster R-CNNs, two images, the second without objects."""
    torch.manual_seed(0)
    teacher, student = (build_detector("frcnn_nano", 3, fpn_channels=width).eval() for width in (48, 32))
    images = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        pyramid, raw = teacher.raw(images)
    boxes = torch.tensor([[[8.0, 8, 40, 40], [0, 0, 0, 0]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
    valid = torch.tensor([[True, False], [False, False]])
    targets = Targets(boxes, torch.zeros(2, 2, dtype=torch.long), valid)
    return SimpleNamespace(teacher=pyramid, raw=raw, student=student, images=images, targets=targets)


def run(scene: SimpleNamespace, method: Distillation):
    pyramid, raw = scene.student.raw(scene.images)
    for x in pyramid:
        x.retain_grad()
    proposals = torch.tensor([[[4.0, 4, 60, 50], [0, 0, 0, 0]]] * 2), torch.tensor([[True, False]] * 2)
    terms, instances = method(
        scene.teacher,
        pyramid,
        scene.raw,
        raw,
        functions=scene.student,
        strides=scene.student.strides,
        image_size=SIZE,
        targets=scene.targets,
        proposals=lambda: proposals,
    )
    return terms, instances, pyramid, raw


def test_all_methods_together(scene: SimpleNamespace) -> None:
    method = Distillation(GIDLoss(32, 48), FitNet(32, 48, 2.0), FineGrained(32, 48, 0.5), Mimicking(32, 48, 3.0))
    terms, instances, pyramid, raw = run(scene, method)
    assert list(terms) == method.term_names
    assert set(terms) == {
        *("feat_loss", "rel_loss", "resp_loss", "fitnet_loss", "fine_grained_loss", "mimicking_loss"),
    }
    assert instances.valid.any()
    adapted = method.fitnet.adapt(pyramid)
    torch.testing.assert_close(terms["fitnet_loss"], 2.0 * fitnet.fitnet_loss(scene.teacher, adapted))
    locations = sum(x[0, 0].numel() for x in pyramid)
    mask = imitation_mask(raw.priors, scene.targets, locations)
    assert mask[0].any()
    assert not mask[1].any()
    near = fine_grained_loss(scene.teacher, method.fine_grained.adapt(pyramid), mask)
    torch.testing.assert_close(terms["fine_grained_loss"], 0.5 * near)
    for name in ("fitnet_loss", "fine_grained_loss", "mimicking_loss"):
        gradients = torch.autograd.grad(terms[name], pyramid, retain_graph=True, allow_unused=True)
        assert any(g is not None and bool(g.any()) for g in gradients), name
    sum(terms.values()).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in method.parameters())


@pytest.mark.parametrize("second_stage", [True, False])
def test_proposals_are_cropped_where_the_second_stage_crops_them(scene: SimpleNamespace, second_stage: bool) -> None:
    proposals = torch.tensor([[[4.0, 4, 60, 50], [0, 0, 20, 20], [0, 0, 30, 9]]] * 2), torch.ones(2, 3).bool()
    level = torch.tensor([[3, 0, 1], [2, 1, 0]])
    rules = LevelRules(lambda indices: indices, (lambda boxes: level) if second_stage else None)
    student, _ = scene.student.raw(scene.images)
    strides = scene.student.strides
    plan = plan_rois(proposals[0], strides, SIZE, level if second_stage else None)  # by size otherwise
    method = Mimicking(32, 48, 2.0)
    crops = [roi_features(pyramid, plan, strides, size=7) for pyramid in (scene.teacher, student)]
    expected = 2.0 * mimicking_loss(crops[0], method.adapt(crops[1]), proposals[1])
    torch.testing.assert_close(method(scene.teacher, student, proposals, strides, SIZE, rules), expected)
    other = method(scene.teacher, student, proposals, strides, SIZE)
    assert torch.equal(other, expected) != second_stage


def test_only_what_is_chosen_is_computed(scene: SimpleNamespace) -> None:
    terms, instances, *_ = run(scene, Distillation(fitnet=FitNet(32, 48, 1.0)))
    assert set(terms) == {"fitnet_loss"}
    assert instances is None


def test_levels_of_differing_channels(scene: SimpleNamespace) -> None:
    # YOLO's pyramid: an adaptation a level
    method = FitNet([4, 6], [5, 7], 1.0)
    teacher, student = ([torch.rand(1, c, 4, 4) for c in widths] for widths in ((5, 7), (4, 6)))
    assert method(teacher, student) > 0
    assert [tuple(c.weight.shape[:2]) for c in method.adapt.convs] == [(5, 4), (7, 6)]


@pytest.mark.parametrize(
    ("text", "names"), [("none", ()), ("gid", ("gid",)), ("fitnet+gid", ("fitnet", "gid")), ("gid+gid", ("gid",))]
)
def test_settings(text: str, names: tuple[str, ...]) -> None:
    assert parse_methods(text) == names


@pytest.mark.parametrize("text", ["", "hint", "gid,fitnet", "none+gid"])
def test_settings_that_do_not_exist(text: str) -> None:
    with pytest.raises(ValueError, match="give none, or some of gid, fitnet, fine_grained, mimicking"):
        parse_methods(text)
