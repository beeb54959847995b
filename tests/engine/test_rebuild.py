"""Models survive their checkpoints, which hold nothing but data; stock readers open them too."""

import copy
import io
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_helpers import FAST, train_one_epoch
from torchvision.models import detection
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel, load_checkpoint
from ultralytics.utils import DEFAULT_CFG, IterableSimpleNamespace
from ultralytics.utils.torch_utils import ModelEMA, strip_optimizer

from gid_yolo import GID
from gid_yolo.cfg import model_names
from gid_yolo.detectors.backbone import WeightSource
from gid_yolo.detectors.build import model_config
from gid_yolo.engine.checkpoint import load_any, load_model
from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.engine.distillation import make_projector
from gid_yolo.engine.rebuild import plain
from gid_yolo.engine.teacher import share_classes
from gid_yolo.engine.teacher_student import TeacherStudentModel
from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.engine.yolo_trainer import YOLOTrainer
from gid_yolo.errors import UserError

SMALL = [name for name in model_names() if name.endswith(("_nano", "_small", "_r10", "_mbv2"))]


def stored(model: torch.nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save({"ema": model}, buffer)
    return buffer.getvalue()


def restored(model: torch.nn.Module):
    return torch.load(io.BytesIO(stored(model)), weights_only=True)["ema"]


def assert_same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    """Tensors, their precision, what is trained, and what is no part of the state."""
    for one, other in ((a.state_dict(), b.state_dict()), (dict(a.named_buffers()), dict(b.named_buffers()))):
        assert list(one) == list(other)
        for name, value in one.items():
            assert torch.equal(value, other[name]), name
            assert value.dtype == other[name].dtype
    assert [p.requires_grad for p in a.parameters()] == [p.requires_grad for p in b.parameters()]
    assert a.training == b.training


def small(name: str = "retina_nano", **changes) -> GIDDetectionModel:
    model = GIDDetectionModel(name, nc=3, verbose=False)
    model.names = {0: "a", 1: "b", 2: "c"}
    vars(model).update(changes)
    return model


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("half", [True, False])
def test_every_detector_survives(name: str, half: bool) -> None:
    model = small(name).eval()
    model = model.half() if half else model
    found = restored(model)
    assert_same(model, found)
    assert found.yaml == model.yaml
    images = torch.rand(1, 3, 96, 64)
    with torch.no_grad():
        assert torch.equal(model.float()(images)[0], found.float()(images)[0])


def test_what_a_model_knows_survives() -> None:
    model = small(
        record={"data": "my.yaml", "lr_steps": [8, 11], "fraction": 1.0, "teacher": None},
        args=IterableSimpleNamespace(imgsz=64, project=Path("runs"), freeze=("a", 1)),
        pt_path="runs/best.pt",
        inplace=True,
    ).train()
    model.detector.backbone.source = WeightSource("RANDOM: no network", loaded=False, failed=True)
    for parameter in model.detector.backbone.parameters():
        parameter.requires_grad_(False)
    found = restored(model.to(memory_format=torch.channels_last))
    assert_same(model, found)
    assert found.record == model.record
    assert found.args == {"imgsz": 64, "project": "runs", "freeze": ("a", 1)}
    assert (found.names, found.nc, found.pt_path, found.inplace, found.task) == (
        model.names, 3, "runs/best.pt", True, "detect",
    )  # fmt: skip
    assert found.detector.backbone.source == model.detector.backbone.source
    assert found.criterion is None
    assert torch.equal(found.stride, model.stride)


def test_loading_draws_no_random_numbers() -> None:
    data = stored(small())
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    torch.load(io.BytesIO(data), weights_only=True)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    "config",
    [
        {"freeze_bn": True, "frozen_stages": 2},
        {"backbone": "resnet10t"},
        {"detector": "fcos", "settings": {"fpn_channels": 32, "center_radius": float("inf")}},
    ],
)
def test_other_settings_survive(config: dict) -> None:
    model = GIDDetectionModel({**model_config("retina_nano"), **config}, nc=2, verbose=False)
    found = restored(model)
    assert_same(model, found)
    assert found.frozen_names == model.frozen_names


@pytest.mark.parametrize("name", ["retina_nano", "fcos_nano", "frcnn_nano"])
@torch.no_grad()
def test_a_model_of_fewer_classes_survives(name: str) -> None:
    model = small(name).eval().with_classes([2, 0], {0: "c", 1: "a"})
    found = restored(model)
    assert_same(model, found)
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(model(images)[0], found(images)[0])
    assert (found.names, found.nc, found.yaml["nc"]) == ({0: "c", 1: "a"}, 2, 2)


@torch.no_grad()
def test_a_folded_model_survives() -> None:
    model = small().eval().fuse(verbose=False)
    assert model.folded
    found = restored(model)
    assert found.is_fused()
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(model(images)[0], found(images)[0])


@pytest.mark.parametrize(
    "make",
    [detection.retinanet_resnet50_fpn_v2, detection.fcos_resnet50_fpn, detection.fasterrcnn_mobilenet_v3_large_fpn],
)
def test_a_converted_model_survives(tmp_path, make) -> None:
    path = tmp_path / "theirs.pth"
    torch.save(make(weights=None, weights_backbone=None, num_classes=4).state_dict(), path)
    model = load_model(path)[0]
    found = restored(model)
    assert_same(model, found)
    assert found.names == model.names


def test_copies_are_as_they_were() -> None:
    model = small()
    model.extra = lambda: 1  # a copy has everything, a file does not
    for found in (copy.deepcopy(model), ModelEMA(model).ema):
        assert found.extra() == 1
        assert found.state_dict().keys() == model.state_dict().keys()
        assert found.model is not model.model
    assert not hasattr(restored(model), "extra")
    assert pickle.loads(pickle.dumps(model)).names == model.names


def projector_of(method: str, student, teacher):
    return make_projector(SimpleNamespace(**{**GIDTrainer.defaults_for(None), "distill": method}), student, teacher)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("retina_nano", "gid"),
        ("retina_nano", "fitnet"),
        ("retina_nano", "fine_grained"),
        ("frcnn_nano", "mimicking"),
        ("frcnn_nano", "gid+fitnet+fine_grained+mimicking"),
        ("yolo11n.yaml", "gid+fitnet"),
    ],
)
def test_an_unfinished_distillation_survives(name: str, method: str) -> None:
    if name.startswith("yolo"):
        student, teacher = (DetectionModel(name, nc=3, verbose=False) for _ in range(2))
        student.names = teacher.names = {0: "a", 1: "b", 2: "c"}
        student.args = DEFAULT_CFG
    else:
        student, teacher = small(name), small(name)
    shared = share_classes({0: "c", 1: "a"}, student.names)
    model = TeacherStudentModel(student, teacher, projector_of(method, student, teacher), shared).half()
    buffer = io.BytesIO(stored(model))
    found = restored(model) if isinstance(student, GIDDetectionModel) else torch.load(buffer, weights_only=False)["ema"]
    assert type(found) is TeacherStudentModel
    assert_same(model, found)
    assert found.projector.settings == model.projector.settings
    assert found.projector.term_names == model.projector.term_names
    assert (found.shared, found.levels) == (model.shared, model.levels)
    assert found.class_index[0].tolist() == model.class_index[0].tolist()
    assert found.teacher_model is None
    assert torch.equal(found.stride, model.stride)
    assert found.names == model.names
    assert found.views is None
    again = copy.deepcopy(model)
    assert_same(model, again)
    assert again.teacher_model is None


def test_files_of_a_real_run_hold_data_alone(data, teacher) -> None:
    arguments = {**FAST, "model": "retina_nano", "data": str(data), "teacher": str(teacher)}
    trainer = GIDTrainer(overrides={**arguments, "epochs": 2, "distill": "gid+fitnet"})
    train_one_epoch(trainer)
    for path, kind in ((teacher, GIDDetectionModel), (trainer.last, TeacherStudentModel)):
        assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []
        contents = torch.load(path, weights_only=True)
        assert type(contents["ema"] or contents["model"]) is kind
        assert type(load_any(path)[0]) is kind
    stripped = strip_optimizer(trainer.last, str(trainer.last.with_name("stripped.pt")))
    assert type(stripped["model"]) is GIDDetectionModel
    stock, _ = load_checkpoint(trainer.last.with_name("stripped.pt"))
    ours, _ = load_model(trainer.last)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(stock(images)[0], ours(images)[0])


def test_stock_ultralytics_opens_and_evaluates(data, teacher) -> None:
    model = YOLO(teacher)
    assert model.names == {0: "a", 1: "b"}
    assert model.val(data=str(data), imgsz=64, plots=False, verbose=False).box.map >= 0


def test_a_yolo_of_a_run_needs_no_trust(data) -> None:
    trainer = YOLOTrainer(overrides={**FAST, "model": "yolo11n.yaml", "data": str(data), "epochs": 2})
    train_one_epoch(trainer)
    model, ckpt = load_any(trainer.last)
    assert type(model) is DetectionModel
    assert ckpt["optimizer"]["param_groups"]


def test_a_checkpoint_as_ultralytics_publishes_them_needs_no_trust(tmp_path) -> None:
    # What older ones hold besides: the loss, NumPy's numbers, paths, and the way of a layer by getattr
    model = DetectionModel("yolov8n.yaml", nc=2, verbose=False)
    model.names, model.args = {0: "a", 1: "b"}, IterableSimpleNamespace(**vars(DEFAULT_CFG))
    model.criterion = model.init_criterion()
    model.model[-1].forward = model.model[-1].forward
    contents = {"epoch": -1, "best_fitness": np.float64(0.5), "model": model.half(), "ema": None, "optimizer": None}
    metrics = {"fitness": np.float64(0.25)}
    torch.save(
        {**contents, "train_args": {"save_dir": Path("runs"), "imgsz": 64}, "train_metrics": metrics}, tmp_path / "a.pt"
    )
    found, ckpt = load_any(tmp_path / "a.pt")
    assert ckpt["train_metrics"] == {"fitness": 0.25}
    assert found.names == {0: "a", 1: "b"}


class _Whole(GIDDetectionModel):
    """A detector pickled as gid-yolo did before: as code."""

    def __reduce_ex__(self, protocol):
        return object.__reduce_ex__(self, protocol)


_Whole.__module__, _Whole.__qualname__, _Whole.__name__ = (
    GIDDetectionModel.__module__,
    "GIDDetectionModel",
    "GIDDetectionModel",
)


def test_an_older_checkpoint_is_written_anew_by_those_who_trust_it(tmp_path, monkeypatch) -> None:
    model = small(record={"data": "my.yaml"}).eval()
    model.__class__ = _Whole
    monkeypatch.setattr("gid_yolo.engine.detection_model.GIDDetectionModel", _Whole)
    torch.save({"model": model, "train_args": {"imgsz": 64}}, tmp_path / "old.pt")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"GID\('old.pt', trust=True\).save\('new.pt'\) writes it anew as plain data"):
        load_model(tmp_path / "old.pt")
    GID(tmp_path / "old.pt", trust=True).save(tmp_path / "new.pt")
    found, _ = load_model(tmp_path / "new.pt")
    assert found.record == {"data": "my.yaml"}
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(found(images)[0], model.half().float()(images)[0])


def test_plain_values_are_copies() -> None:
    value = {"a": [1, (2.5, None)], 3: {"x"}, "p": Path("a/b"), "n": np.float32(0.5), "s": SimpleNamespace(k=True)}
    assert plain(value) == {"a": [1, (2.5, None)], 3: ["x"], "p": "a/b", "n": 0.5, "s": {"k": True}}
    assert plain([1, {"a": (2,)}], most=10) == [1, {"a": (2,)}]
    for wrong in (torch.zeros(1), [torch.zeros(1)], [1] * 10, {"a": object()}):
        with pytest.raises(ValueError, match="holds"):
            plain(wrong, most=10)
