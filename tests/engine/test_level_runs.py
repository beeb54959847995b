"""Which pyramid level an instance is cropped from, in runs of every kind of detector."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_helpers import FAST
from torchvision.ops.poolers import LevelMapper

import gid_yolo.distill.gid
from gid_yolo import GID
from gid_yolo.distill.feature import plan_rois
from gid_yolo.distill.levels import LevelRules, levels_by_size, overlapping_predictions
from gid_yolo.engine.checkpoint import load_model
from gid_yolo.engine.config import DEFAULTS
from gid_yolo.engine.distillation import make_projector
from gid_yolo.engine.shared_levels import share_levels
from gid_yolo.errors import UserError


@pytest.fixture
def plans(monkeypatch) -> list[tuple]:
    """What every call of `plan_rois` is given."""
    seen: list[tuple] = []

    def noted(boxes, strides, image_size, level=None):
        seen.append((boxes, list(strides), image_size, level))
        return plan_rois(boxes, strides, image_size, level)

    monkeypatch.setattr(gid_yolo.distill.gid, "plan_rois", noted)
    return seen


def distil(data, folder, student: str, teacher: str, **settings) -> list[torch.Tensor]:
    """Train an epoch; the instances' indices of every batch."""
    found = []
    model = GID(student)
    model.add_callback("on_train_batch_end", lambda trainer: found.append(trainer.model.instances.indices))
    model.train(**FAST, data=str(data), save_dir=str(folder), teacher=teacher, **settings)
    return found


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((kind, {"gid_level": "prediction"}) for kind in ("retina_nano", "fcos_nano", "frcnn_nano", "yolo11n.yaml")),
        ("yolo11n.yaml", {}),  # whose label assignment does not go by size
    ],
)
def test_the_level_of_a_prediction_is_that_of_its_cell(data, tmp_path, teachers, plans, kind, settings) -> None:
    found = distil(data, tmp_path, kind, teachers[kind], **settings)
    assert len(plans) == len(found) > 0
    for (_, strides, (height, width), level), indices in zip(plans, found, strict=True):
        anchors = {"retina_nano": 9, "frcnn_nano": 3}.get(kind, 1)  # a cell
        cells = [-(-height // s) * -(-width // s) for s in strides]
        owner = torch.tensor([i for i, count in enumerate(cells) for _ in range(count * anchors)])  # (R,)
        assert torch.equal(level, owner[indices])


def test_faster_rcnn_reads_it_where_its_second_stage_does(data, tmp_path, teachers, plans) -> None:
    distil(data, tmp_path, "frcnn_nano", teachers["frcnn_nano"])
    mapper = LevelMapper(2, 5, canonical_scale=112, canonical_level=4)  # the nano's
    assert plans
    for boxes, strides, image_size, level in plans:
        assert strides == [4, 8, 16, 32, 64]
        assert torch.equal(level, torch.stack([mapper([image]) for image in boxes]))
        assert not torch.equal(level, levels_by_size(boxes, strides, image_size))  # which it was before


def test_under_a_teacher_that_lacks_the_level_it_is_the_nearest_one(data, tmp_path, teachers, plans) -> None:
    distil(data, tmp_path, "frcnn_nano", teachers["retina_nano"], gid_response=0)
    mapper = LevelMapper(2, 5, canonical_scale=112, canonical_level=4)
    assert plans
    for boxes, strides, _, level in plans:
        assert strides == [8, 16, 32, 64]  # the student's stride 4 is not the teacher's
        expected = torch.stack([mapper([image]) for image in boxes])
        assert torch.equal(level, (expected - 1).clamp(min=0))


@pytest.mark.parametrize(
    ("student", "settings"),
    [
        ("retina_nano", {}),
        ("fcos_nano", {}),
        ("frcnn_nano", {"gid_level": "size"}),
        ("yolo11n.yaml", {"gid_level": "size"}),
        ("yolo11n.yaml", {"gid_types": "gt"}),  # which nothing predicted
        ("yolo11n.yaml", {"teacher": "retina_nano", "gid_response": 0}),  # whose predictions are others
    ],
)
def test_it_goes_by_size_where_nothing_else_is_to_go_by(data, tmp_path, teachers, plans, student, settings) -> None:
    others = {key: value for key, value in settings.items() if key != "teacher"}
    distil(data, tmp_path, student, teachers[settings.get("teacher", student)], **others)
    assert plans
    assert all(level is None for *_, level in plans)


def test_crops_of_levels_that_differ_in_channels_are_not_standardised(teachers) -> None:
    network = load_model(teachers["yolo11n.yaml"])[0]
    settings = SimpleNamespace(**{**DEFAULTS, "gid_standardize": "crops"})
    with pytest.raises(UserError, match=r"gid_standardize=crops .* differ in channels: give gid_standardize=maps"):
        make_projector(settings, network, network)
    own = load_model(teachers["retina_nano"])[0]
    assert make_projector(settings, own, own).gid.standardize == "crops"


def test_none_is_the_default(teachers) -> None:
    network = load_model(teachers["frcnn_nano"])[0]
    projector = make_projector(SimpleNamespace(**{**DEFAULTS, "gid_level": None}), network, network)
    assert projector.gid.level == DEFAULTS["gid_level"]


@pytest.mark.parametrize(
    ("student", "teacher", "places"),
    [
        ([4, 8, 16, 32, 64], [8, 16, 32, 64, 128], [0, 0, 1, 2, 3]),  # 4 is not shared: 8 is the nearest
        ([8, 16, 32], [8, 16, 32, 64, 128], [0, 1, 2]),
        ([8, 16, 32, 64, 128], [8, 16, 32], [0, 1, 2, 2, 2]),
        ([8, 16, 32, 32], [16, 32, 32], [0, 0, 1, 2]),  # of equal ones each keeps its own
        ([32, 32, 64], [32, 32], [0, 1, 0]),  # as near: the first
    ],
)
def test_a_level_that_is_not_shared_gives_way_to_the_nearest(student, teacher, places) -> None:
    own, theirs = SimpleNamespace(strides=student), SimpleNamespace(strides=teacher)
    identity = LevelRules(lambda indices: indices, lambda boxes: boxes[..., 0].long())
    rules = share_levels(own, theirs).rules(identity, student)
    level = torch.arange(len(student))[None]
    assert rules.of_predictions(level).tolist() == [places]
    assert rules.of_boxes(level[..., None].expand(-1, -1, 4).float()).tolist() == [places]
    assert share_levels(own, theirs).rules(LevelRules(identity.of_predictions), student).of_boxes is None


@pytest.mark.parametrize(
    "settings",
    [
        {"teacher": "retina_nano", "gid_response": 0},  # whose predictions are others
        {"gid_types": "gt"},  # which nothing predicted
    ],
)
def test_where_no_prediction_is_its_own_the_level_is_of_the_nearest(
    data, tmp_path, teachers, plans, monkeypatch, settings
) -> None:
    asked = []

    def noted(instances, predictions):
        found = overlapping_predictions(instances, predictions)
        asked.append((instances, predictions.shape[1], found))
        return found

    monkeypatch.setattr(gid_yolo.distill.gid, "overlapping_predictions", noted)
    teacher = teachers[settings.pop("teacher", "yolo11n.yaml")]
    distil(data, tmp_path, "yolo11n.yaml", teacher, gid_level="prediction", **settings)
    assert len(plans) == len(asked) > 0
    for (boxes, strides, (height, width), level), (instances, outputs, found) in zip(plans, asked, strict=True):
        owner = torch.tensor([i for i, s in enumerate(strides) for _ in range((height // s) * (width // s))])
        assert strides == [8, 16, 32]  # all of its levels
        assert outputs == len(owner)  # its own predictions
        assert torch.equal(boxes, instances)
        assert torch.equal(level, owner[found])


def test_the_benchmark_counts_every_box_once_by_each_rule(data, teachers) -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "levels.py"
    folder = next(iter(data.parent.rglob("*.jpg" if any(data.parent.rglob("*.jpg")) else "*.png"))).parent
    for kind, strides in (("frcnn_nano", 5), ("yolo11n.yaml", 3)):
        words = ["--model", teachers[kind], "--images", str(folder), "--imgsz", "64", "--conf", "0"]
        done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        cells = [x.strip() for x in done.stdout.splitlines()[-1].strip("|").split("|")]
        own, size = ([int(n) for n in cell.split()] for cell in cells[1:3])
        assert sum(own) == sum(size) > 0
        assert len(own) == len(size) == strides
