"""Models measured on data whose classes are named otherwise, ordered otherwise, or fewer."""

import pytest
import torch
import yaml
from engine.test_foreign import MAKERS
from engine_helpers import write_data
from torch import nn
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER, ROOT

from gid_yolo import GID
from gid_yolo.detectors.convert.torchvision_checkpoint import CATEGORIES
from gid_yolo.engine.checkpoint import load_model
from gid_yolo.engine.classes import check_classes, fit_classes, match_classes
from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.errors import UserError
from gid_yolo.export.benchmark import benchmark

QUICK = {"runs": 1, "rounds": 1, "warmup": 0, "parity_images": 2, "imgsz": 64}
COCO = yaml.safe_load((ROOT / "cfg" / "datasets" / "coco.yaml").read_text(encoding="utf-8"))["names"]


def save(path, kind: str, labels: int):
    """A torchvision model whose scores lie on both sides of the thresholds and differ by class."""
    model = MAKERS[kind](labels)
    heads = {"faster_rcnn": lambda: model.roi_heads.box_predictor.cls_score}
    layer = heads.get(kind, lambda: model.head.classification_head.cls_logits)()
    with torch.no_grad():
        nn.init.normal_(layer.weight, std=0.05)
        nn.init.normal_(layer.bias)
    torch.save(model.state_dict(), path)
    return path


@torch.no_grad()
def scores(model, images):
    return model.float().eval()(images)[0][:, 4:]


@pytest.mark.parametrize(("kind", "labels"), [("retinanet", 3), ("retinanet", 2), ("fcos", 3), ("faster_rcnn", 3)])
def test_a_file_without_names_is_measured_in_the_datas_order(kind, labels, tmp_path, data, monkeypatch) -> None:
    lines = []
    monkeypatch.setattr(LOGGER, "warning", lambda text: lines.append(text))
    path = save(tmp_path / "mine.pth", kind, labels)
    model = GID(path)
    model.val(data=str(data), imgsz=64, plots=False)
    assert model.columns is not None
    assert any("classes have no names: they are taken in the data's order" in line for line in lines)
    assert len(model.model.names) == labels - (kind == "faster_rcnn")  # the model itself is left as it was
    if kind != "faster_rcnn":
        images, names = torch.rand(1, 3, 64, 64), {0: "a", 1: "b"}
        fitted = fit_classes(load_model(path)[0], names, "model", data)
        assert fitted.names == names
        # Label 0 is nothing's where there is one more
        torch.testing.assert_close(scores(fitted, images), scores(load_model(path)[0], images)[:, labels - 2 :])


@pytest.mark.parametrize("kind", ["retinanet", "faster_rcnn"])
def test_cocos_labels_are_measured_by_name(kind, tmp_path) -> None:
    data = write_data(tmp_path / "data", names=("Zebra", "person"))
    path = save(tmp_path / "coco.pth", kind, len(CATEGORIES))
    report = benchmark(path, data=data, project=str(tmp_path), **QUICK)
    (row,) = report.rows
    assert (row.failed, row.compared) == (None, True)
    assert row.columns is not None
    model, _ = load_model(path)
    fitted = fit_classes(model, {0: "Zebra", 1: "person"}, "model", data)
    assert fitted.nc == fitted.detector.num_classes == fitted.yaml["nc"] == 2
    images = torch.rand(1, 3, 64, 64)
    if kind == "retinanet":  # COCO's ids are 24 and 1
        torch.testing.assert_close(scores(fitted, images), scores(model, images)[:, [24, 1]])


def test_every_class_of_coco_has_its_name(tmp_path) -> None:
    model, _ = load_model(save(tmp_path / "coco.pth", "fcos", len(CATEGORIES)))
    fitted = fit_classes(model, COCO, "model", "coco.yaml")
    images = torch.rand(1, 3, 64, 64)
    index = [CATEGORIES.index(name) for name in COCO.values()]
    assert len(set(index)) == 80
    torch.testing.assert_close(scores(fitted, images), scores(model, images)[:, index])


def test_classes_in_another_order_give_the_same_result(teacher, tmp_path, data) -> None:
    swapped = tmp_path / "swapped.yaml"
    content = {**yaml.safe_load(data.read_text()), "path": str(data.parent), "names": {0: "b", 1: "a"}}
    swapped.write_text(yaml.safe_dump(content))
    labels = {0: "b", 1: "a"}
    model, images = load_model(teacher)[0], torch.rand(1, 3, 64, 64)
    fitted = fit_classes(model, labels, "model", swapped)
    torch.testing.assert_close(scores(fitted, images), scores(model, images)[:, [1, 0]])
    assert fit_classes(model, {0: "a", 1: "b"}, "model", data) is model
    GID(teacher).val(data=str(swapped), imgsz=64, plots=False)


@pytest.mark.parametrize("labels", [4, 6])
def test_numbers_of_classes_that_do_not_match_are_one_sentence(tmp_path, data, labels) -> None:
    path = save(tmp_path / "mine.pth", "retinanet", labels)
    with pytest.raises(
        UserError, match=rf"model=.* knows {labels} classes \(label 0, .*\), but data=.* has 2 \(a, b\)"
    ):
        GID(path).val(data=str(data), imgsz=64)
    with pytest.raises(UserError, match=rf"model=.* knows {labels} classes"):
        benchmark(path, data=data, project=str(tmp_path), **QUICK)


def test_a_yolo_is_not_reordered() -> None:
    model = DetectionModel("yolo11n.yaml", nc=2, verbose=False)
    model.names = {0: "a", 1: "b"}
    assert fit_classes(model, {0: "a", 1: "b"}, "model", "x.yaml") is model
    with pytest.raises(UserError, match=r"model=y.pt knows 2 classes \(a, b\), but data=x.yaml has 2 \(b, a\)"):
        fit_classes(model, {0: "b", 1: "a"}, "model=y.pt", "x.yaml")


def test_a_class_that_the_model_lacks() -> None:
    model = GIDDetectionModel("retina_nano", nc=2, verbose=False)
    model.names = {0: "a", 1: "b"}
    with pytest.raises(UserError, match=r"but data=x.yaml has 2 \(a, c\)"):
        fit_classes(model, {0: "a", 1: "c"}, "model", "x.yaml")


@pytest.mark.parametrize("classes", [0, [1], (0, 1), None])
def test_classes_that_exist(classes) -> None:
    check_classes(classes, {0: "a", 1: "b"})


@pytest.mark.parametrize("classes", [2, -1, [0, 2], [], "a", ["a"], 0.5, True, [1.0]])
def test_classes_that_do_not_exist(classes) -> None:
    with pytest.raises(UserError, match=r"must be ids of the classes that exist: 0 \(a\), 1 \(b\)\."):
        check_classes(classes, {0: "a", 1: "b"})


def test_a_class_stands_for_one_name_alone() -> None:
    # Exact names first; "a" takes the only class, although "A" would fit it as well
    assert match_classes({0: "a", 1: "b"}, {0: "a", 1: "A", 2: "b"}, "model") == {0: 0, 2: 1}
    assert match_classes({0: "A", 1: "a"}, {0: "a", 1: "A"}, "model") == {0: 1, 1: 0}
