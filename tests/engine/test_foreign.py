"""Weight files of other libraries: evaluated, exported and used as teachers."""

import csv
import pickle
import sys
import types

import numpy as np
import pytest
import torch
import yaml
from engine_helpers import FAST, write_data
from reference.mmdetection import fcos, fcos_config, meta_2, meta_3, retinanet, retinanet_config
from torchvision.models.detection import (
    FCOS,
    FasterRCNN,
    RetinaNet,
    fasterrcnn_mobilenet_v3_large_fpn,
    fasterrcnn_resnet50_fpn_v2,
    retinanet_resnet50_fpn_v2,
)
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import _default_anchorgen
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from gid_yolo import GID
from gid_yolo.cli import main
from gid_yolo.detectors.build import PRIOR_SETTINGS, model_config
from gid_yolo.detectors.convert import from_torchvision
from gid_yolo.detectors.convert.torchvision_checkpoint import CATEGORIES
from gid_yolo.engine.checkpoint import fingerprint, load_model
from gid_yolo.engine.config import thresholds
from gid_yolo.engine.teacher import share_classes
from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.errors import UserError

SMALL = {"weights": None, "weights_backbone": None}


def dense_backbone():
    layers = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}
    return resnet_fpn_backbone(backbone_name="resnet18", weights=None, **layers)


MAKERS = {
    "retinanet": lambda classes: RetinaNet(dense_backbone(), classes, anchor_generator=_default_anchorgen()),
    "retinanet_v2": lambda classes: retinanet_resnet50_fpn_v2(**SMALL, num_classes=classes),
    "fcos": lambda classes: FCOS(dense_backbone(), classes),
    "faster_rcnn": lambda classes: FasterRCNN(resnet_fpn_backbone(backbone_name="resnet18", weights=None), classes),
    "faster_rcnn_v2": lambda classes: fasterrcnn_resnet50_fpn_v2(**SMALL, num_classes=classes),
    "faster_rcnn_mobile": lambda classes: fasterrcnn_mobilenet_v3_large_fpn(**SMALL, num_classes=classes),
}


@pytest.mark.parametrize("kind", sorted(MAKERS))
@torch.no_grad()
def test_a_file_is_the_model_it_was_saved_from(kind: str, tmp_path) -> None:
    model = MAKERS[kind](3).eval()
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    path = tmp_path / "weights.pth"
    torch.save({"model": model.state_dict(), "epoch": 3}, path)  # as torchvision's own reference script saves
    loaded, _ = load_model(path)
    expected = from_torchvision(model).raw(images := torch.rand(1, 3, 64, 96))[1]
    raw = loaded.raw(images)[1]
    torch.testing.assert_close(raw.logits, expected.logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(raw.regression, expected.regression, rtol=1e-5, atol=1e-6)
    assert torch.equal(raw.priors, expected.priors)
    assert loaded.nc == (2 if kind.startswith("faster") else 3)


@pytest.mark.parametrize("kind", ["retinanet", "faster_rcnn"])
def test_cocos_labels_have_their_names(kind: str, tmp_path) -> None:
    path = tmp_path / "coco.pth"
    torch.save(MAKERS[kind](len(CATEGORIES)).state_dict(), path)
    names = load_model(path)[0].names
    index = share_classes(names, {0: "Person", 1: "zebra"}).teacher
    # COCO's category ids are 1 for a person and 24 for a zebra; Faster R-CNN's classes begin without the background
    assert index == ([0, 23] if kind == "faster_rcnn" else [1, 24])


@pytest.mark.parametrize(("classes", "index"), [(3, [1, 2]), (2, [0, 1])])
def test_classes_without_names_are_taken_in_order(classes: int, index: list[int], tmp_path) -> None:
    path = tmp_path / "mine.pth"
    torch.save(MAKERS["fcos"](classes).state_dict(), path)
    names = load_model(path)[0].names
    assert share_classes(names, {0: "a", 1: "b"}).teacher == index
    with pytest.raises(UserError, match=r"none of the 4 that are trained \(a, b, c, d\)"):
        share_classes(names, dict(enumerate("abcd")))


def test_a_file_that_fits_only_in_part_is_refused_with_what_is_missing(tmp_path, capsys, data) -> None:
    state = MAKERS["retinanet"](3).state_dict()
    del state["head.regression_head.conv.2.0.weight"]
    state["head.mask.weight"] = torch.zeros(1)
    path = tmp_path / "part.pth"
    torch.save(state, path)
    assert main(["train", "model=retina_nano", f"data={data}", f"teacher={path}"]) == 2
    text = capsys.readouterr().err
    assert "only in part: missing head.regression_head.conv.2.0.weight; left over head.mask.weight" in text


@pytest.mark.parametrize("content", [b"", b"<html>", {"layer.weight": torch.zeros(2)}, torch.zeros(2)])
def test_other_files_are_one_sentence(content, tmp_path, capsys, data) -> None:
    path = tmp_path / "other.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert main(["train", "model=retina_nano", f"data={data}", f"teacher={path}"]) == 2
    text = capsys.readouterr().err
    assert f"teacher={path}" in text
    assert text.count("\n") == 1


def test_torchvisions_weights_teach(tmp_path) -> None:
    data = write_data(tmp_path / "data")
    path = tmp_path / "teacher.pth"
    torch.save(MAKERS["retinanet"](3).state_dict(), path)
    overrides = {"model": "retina_nano", **FAST, "data": str(data), "teacher": str(path)}
    trainer = GIDTrainer(overrides={**overrides, "save_dir": str(tmp_path / "run")})
    trainer.train()
    with trainer.csv.open() as file:
        row = next(csv.DictReader(file))
    assert all(float(row[f"train/{name}"]) > 0 for name in ("feat_loss", "rel_loss", "resp_loss"))
    student, _ = load_model(trainer.best)
    assert student.yaml["settings"]["fit_strides"]  # torchvision's anchors
    assert GID(path).val(data=str(write_data(tmp_path / "same", names=("label 0", "label 1", "label 2")))) is not None


def test_detectron2s_pickles_are_read_and_nothing_in_them_is_run(tmp_path) -> None:
    from detectors import test_detectron2

    state = test_detectron2.retinanet()
    path = tmp_path / "model_final.pkl"
    arrays = {key: value.numpy() for key, value in state.items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    model, _ = load_model(path)
    assert model.nc == 5
    assert torch.equal(model.detector.head.cls_tower[0].weight, state["head.cls_subnet.0.weight"])
    torch.save({"model": state, "iteration": 7}, tmp_path / "model_final.pth")
    other = load_model(tmp_path / "model_final.pth")[0].state_dict()
    assert all(torch.equal(value, other[key]) for key, value in model.state_dict().items())

    class Trap:
        def __reduce__(self):
            return (print, ("run",))

    path.write_bytes(pickle.dumps({"model": {"backbone.bottom_up.x": Trap()}}))
    with pytest.raises(UserError, match=r"it holds a builtins.print"):
        load_model(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_mmdetections_files_of_2x(zipped: bool, tmp_path) -> None:
    state, path = retinanet(), tmp_path / "latest.pth"
    meta = {**meta_2(retinanet_config("caffe")), "CLASSES": tuple("vwxyz"), "epoch": 12}
    torch.save({"meta": meta, "state_dict": state}, path, _use_new_zipfile_serialization=zipped)
    model, _ = load_model(path)
    assert model.names == dict(enumerate("vwxyz"))
    assert torch.equal(model.detector.head.cls_tower[0].weight, state["bbox_head.cls_convs.0.conv.weight"])
    meta["CLASSES"] = None
    torch.save({"meta": meta, "state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    assert load_model(path)[0].names[4] == "class 4"


class Trap:
    """Calls a function when it is read."""

    def __init__(self, function) -> None:
        self.function = function

    def __reduce__(self):
        return self.function, ("run",)


@pytest.fixture
def pretend(monkeypatch):
    """Give a class or a function a place in a module that is there while a file is written, and not after."""

    def place(thing, module: str, name: str) -> None:
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        setattr(sys.modules[module], name, thing)
        thing.__module__, thing.__qualname__ = module, name

    return place


def test_mmdetections_files_of_3x_are_read_without_the_library(tmp_path, pretend, monkeypatch) -> None:
    class Buffer:
        """As mmengine's: its state names its methods."""

        def __init__(self) -> None:
            self.log, self.methods = np.zeros(3), {"mean": Buffer.mean}

        def mean(self) -> None:
            """One of them."""

    module = "mmengine.logging.history_buffer"
    pretend(Buffer, module, "HistoryBuffer")
    Buffer.mean.__module__, Buffer.mean.__qualname__ = module, "HistoryBuffer.mean"
    path = tmp_path / "epoch_12.pth"
    meta = {**meta_3(fcos_config()), "dataset_meta": {"classes": tuple("vwxyz")}, "seed": np.int64(3)}
    hub = {"log_scalars": {"train/loss": Buffer()}, "runtime_info": {"epoch": 12}}
    torch.save({"meta": meta, "state_dict": fcos(), "message_hub": hub, "optimizer": {"state": {}}}, path)
    monkeypatch.undo()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    model, _ = load_model(path)
    assert model.names == dict(enumerate("vwxyz"))


@pytest.mark.parametrize(("module", "read"), [("mmengine.evil", True), ("evil", False)])
def test_nothing_in_mmdetections_files_is_run(module: str, read: bool, tmp_path, pretend) -> None:
    ran = []

    def function(text: str) -> None:
        ran.append(text)

    pretend(function, module, "function")
    path = tmp_path / "trap.pth"
    content = {"meta": meta_3(retinanet_config()), "state_dict": retinanet(), "message_hub": Trap(function)}
    torch.save(content, path)
    if read:
        load_model(path)
    else:
        with pytest.raises(UserError, match=r"evil.function.*'state_dict': file\['state_dict'\]"):
            load_model(path)
    assert ran == []


def test_mmdetections_weights_without_a_configuration_say_what_to_add(tmp_path, capsys, data) -> None:
    path = tmp_path / "bare.pth"
    torch.save(retinanet(), path)
    assert main(["train", "model=retina_nano", f"data={data}", f"teacher={path}"]) == 2
    text = capsys.readouterr().err
    assert "does not hold mmdetection's configuration" in text
    assert "Config.fromfile(the config).pretty_text" in text


def test_mmdetections_fcos_teaches_one_of_another_coding(tmp_path, data) -> None:
    path = tmp_path / "teacher.pth"
    names = ("a", "b", "c", "d", "e")
    torch.save({"meta": {**meta_3(fcos_config()), "dataset_meta": {"classes": names}}, "state_dict": fcos()}, path)
    overrides = {"model": "fcos_nano", **FAST, "data": str(data), "teacher": str(path)}
    trainer = GIDTrainer(overrides={**overrides, "save_dir": str(tmp_path / "run")})
    trainer.train()
    with trainer.csv.open() as file:
        row = next(csv.DictReader(file))
    assert all(0 < float(row[f"train/{name}"]) < float("inf") for name in ("feat_loss", "rel_loss", "resp_loss"))
    student, _ = load_model(trainer.best)
    assert student.yaml["settings"]["point_offset"] == 0.5  # the teacher's points
    assert "box_coding" not in student.yaml["settings"]  # but its own coding


def test_a_foreign_teacher_leaves_the_students_numbers_alone(tmp_path, data) -> None:
    # Loading it builds models, which draw weights: the student's own, and what its losses draw, must not move
    path, name = tmp_path / "teacher.pth", "frcnn_nano"
    torch.save(MAKERS["faster_rcnn"](3).state_dict(), path)
    settings = tmp_path / "student.yaml"
    theirs = load_model(path)[0].yaml["settings"]
    config = model_config(name)
    config["settings"] = {k: v for k, v in config["settings"].items() if k not in PRIOR_SETTINGS}
    config["settings"] |= {k: theirs[k] for k in PRIOR_SETTINGS if k in theirs}
    settings.write_text(yaml.safe_dump(config))
    seen = []

    def remember(trainer) -> None:
        student = getattr(trainer.model, "student_model", trainer.model)
        seen.append((fingerprint(student), torch.get_rng_state().sum().item()))

    for extra in ({}, {"teacher": str(path)}):
        arguments = {"model": str(settings), **FAST, "data": str(data), "save_dir": str(tmp_path / str(len(seen)))}
        trainer = GIDTrainer(overrides={**arguments, **extra})
        trainer.add_callback("on_train_start", remember)
        trainer.train()
    assert seen[0] == seen[1]


def test_classes_of_a_file_without_a_background_are_not_shifted() -> None:
    assert share_classes({0: "class 0", 1: "class 1"}, {0: "a", 1: "b"}).teacher == [0, 1]
    with pytest.raises(UserError, match="none of the 2 that are trained"):
        share_classes({i: f"class {i}" for i in range(3)}, {0: "a", 1: "b"})


def test_an_fcos_is_measured_at_the_threshold_it_was_made_for(tmp_path) -> None:
    path = tmp_path / "fcos.pth"
    torch.save(MAKERS["fcos"](3).state_dict(), path)
    assert thresholds(load_model(path)[0].yaml)["iou"] == FCOS(dense_backbone(), 3).nms_thresh == 0.6
