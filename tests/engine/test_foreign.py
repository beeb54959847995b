"""Weight files of torchvision: evaluated, exported and used as teachers."""

import csv
import pickle
import sys
import types

import numpy as np
import pytest
import torch
import yaml
from engine_helpers import FAST, write_data
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
    from detectors.test_detectron2 import retinanet

    state = retinanet()
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


@pytest.mark.parametrize("version", [2, 3])
def test_mmdetections_checkpoints_are_read(version: int, tmp_path) -> None:
    from detectors.mmdetection_files import config, fcos

    state, names = fcos(), ("cat", "dog", "cow", "hen", "owl")
    text = config("FCOS", style="caffe", version=version)
    new = {"cfg": text, "dataset_meta": {"classes": names, "palette": None}, "experiment_name": "x", "epoch": 12}
    meta = new if version == 3 else {"config": text, "CLASSES": names, "mmdet_version": "2.28.2", "epoch": 12}
    path = tmp_path / "epoch_12.pth"
    torch.save({"meta": meta, "state_dict": state, "optimizer": {"state": {}}}, path)
    model, _ = load_model(path)
    assert list(model.names.values()) == list(names)
    assert torch.equal(model.detector.head.level_scales, torch.tensor([0.8, 0.9, 1.0, 1.1, 1.2]))
    assert model(torch.rand(1, 3, 64, 64))[0].shape[1] == 4 + 5
    # A file that names another number of classes than it predicts
    meta = {**meta, "CLASSES": names[:4], "dataset_meta": {}}
    torch.save({"meta": meta, "state_dict": state}, path)
    with pytest.raises(UserError, match="it names 4 classes and predicts 5"):
        load_model(path)


def test_the_log_of_a_training_run_is_passed_over_and_not_run(tmp_path) -> None:
    from detectors.mmdetection_files import config, retinanet

    package = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:  # as mmengine's: arrays, and its own methods in a dict
        def __init__(self) -> None:
            self._log_history = np.array([0.5, 1.5])
            self._count_history = np.array([1, 1])
            self._set = {"min": HistoryBuffer.smallest}

        def smallest(self) -> float:
            return float(self._log_history.min())

    for thing, name in ((HistoryBuffer, "HistoryBuffer"), (HistoryBuffer.smallest, "HistoryBuffer.smallest")):
        thing.__module__, thing.__qualname__ = package.__name__, name
    package.HistoryBuffer = HistoryBuffer
    path = tmp_path / "epoch_1.pth"
    content = {"meta": {"cfg": config("RetinaNet")}, "state_dict": retinanet()}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("mmengine", "mmengine.logging", package.__name__):
            patch.setitem(sys.modules, name, package)
        torch.save({**content, "message_hub": {"loss": HistoryBuffer()}}, path)
    assert load_model(path)[0].nc == 5

    class Trap:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({**content, "message_hub": Trap()}, path)
    with pytest.raises(UserError, match="cannot be read as weights alone"):
        load_model(path)


def test_an_fcos_of_mmdetection_teaches(tmp_path, data) -> None:
    from detectors.mmdetection_files import config, fcos

    path = tmp_path / "teacher.pth"
    torch.save({"meta": {"cfg": config("FCOS"), "CLASSES": tuple("abcde")}, "state_dict": fcos()}, path)
    trainer = GIDTrainer(
        overrides={
            "model": "fcos_nano",
            **FAST,
            "data": str(data),
            "teacher": str(path),
            "save_dir": str(tmp_path / "r"),
        }
    )
    trainer.train()
    with trainer.csv.open() as file:
        row = next(csv.DictReader(file))
    assert all(float(row[f"train/{name}"]) > 0 for name in ("feat_loss", "rel_loss", "resp_loss"))
    assert load_model(trainer.best)[0].yaml["settings"]["centered_points"]  # the teacher's


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
