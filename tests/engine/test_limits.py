"""`conf`, `iou` and `max_det` of Faster R-CNN, whose NMS is in the network."""

import onnx
import onnxruntime
import pytest
import torch
import yaml
from torch import nn
from torchvision.ops import box_iou

from gid_yolo import GID
from gid_yolo.cfg import MODELS_DIR
from gid_yolo.engine.checkpoint import load_model
from gid_yolo.engine.config import thresholds
from gid_yolo.engine.detection_model import GIDDetectionModel, limited
from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.engine.validator import GIDValidator

OWN = {"conf": 0.1, "iou": 0.4, "max_det": 30}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A detector of random weights, with limits of its own, that finds many boxes of all scores."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("frcnn") / "best.pt"
    config = yaml.safe_load((MODELS_DIR / "frcnn_nano.yaml").read_text())
    config["settings"] |= {"box_min_score": 0.1, "box_nms_iou": 0.4, "max_det": 30}
    model = GIDDetectionModel(config, nc=2, verbose=False)
    model.names = {0: "a", 1: "b"}
    for conv in model.detector.rpn.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.normal_(conv.weight, std=0.05)
    nn.init.normal_(model.detector.head.cls_logits.weight, std=0.3)
    torch.save({"model": model, "train_args": {"imgsz": 64}, "epoch": -1}, path)
    return path


@pytest.fixture(scope="module")
def image(data):
    return str(next((data.parent / "images" / "val").glob("*.png")))


@torch.no_grad()
def oracle(checkpoint, image, *, conf, iou, max_det):
    """What a detector with these settings finds."""
    model = load_model(checkpoint)[0]
    detector = model.detector
    detector.box_min_score, detector.box_nms_iou, detector.max_det = conf, iou, max_det
    images = GID(checkpoint)  # Ultralytics reads and scales the image
    images.predict(image, imgsz=64, verbose=False)
    rows = detector(images.predictor.preprocess(images.predictor.batch[1]))[0]
    return rows[rows[:, 4] > 0]


def predict(checkpoint, image, **arguments):
    return GID(checkpoint).predict(image, imgsz=64, verbose=False, **arguments)[0].boxes.data


def test_the_limits_of_the_settings_are_the_defaults(checkpoint):
    assert thresholds(load_model(checkpoint)[0].yaml) == OWN
    assert thresholds({"detector": "faster_rcnn"}) == {"conf": 0.05, "iou": 0.5, "max_det": 100}  # the class's own
    assert thresholds({"detector": "fcos", "train": {"iou": 0.6}}) == {"conf": 0.05, "iou": 0.6, "max_det": 300}
    assert GIDTrainer.defaults_for(str(checkpoint))["max_det"] == 30


@pytest.mark.parametrize(
    "given",
    [{}, {"conf": 0.5}, {"conf": 0.02}, {"iou": 0.7}, {"iou": 0.1}, {"max_det": 5}, {"max_det": 80, "conf": 0.01}],
)
def test_predictions_obey(checkpoint, image, given):
    limits = {**OWN, "conf": 0.25, **given}  # Ultralytics predicts from 0.25 on
    expected = oracle(checkpoint, image, **limits)
    found = predict(checkpoint, image, **given)
    assert len(expected) > 3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)
    assert (found[:, 4] > limits["conf"]).all()
    same = found[:, None, 5] == found[:, 5]
    assert (box_iou(found[:, :4], found[:, :4]).fill_diagonal_(0)[same] <= limits["iou"] + 1e-4).all()


def test_limits_hold_for_one_call_only(checkpoint, image):
    model = GID(checkpoint)
    counts = [len(model.predict(image, imgsz=64, verbose=False, **x)[0]) for x in ({}, {"iou": 0.9}, {})]
    assert counts[0] == counts[2] < counts[1]
    detector = model.model.detector
    assert (detector.box_min_score, detector.box_nms_iou, detector.max_det) == (0.1, 0.4, 30)


def test_classes_are_chosen_before_the_best_are_counted(checkpoint, image):
    everything = oracle(checkpoint, image, conf=0.01, iou=0.4, max_det=300)
    expected = everything[everything[:, 5] == 1][:5]
    found = predict(checkpoint, image, conf=0.01, max_det=5, classes=[1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)


def test_validation_obeys(checkpoint, data, monkeypatch):
    seen = []
    update = GIDValidator.update_metrics

    def remember(self, preds, batch):
        seen.append(torch.cat([p["conf"] for p in preds]))
        update(self, preds, batch)

    monkeypatch.setattr(GIDValidator, "update_metrics", remember)
    counts = {}
    for name, given in (("own", {}), ("conf", {"conf": 0.01, "max_det": 90}), ("iou", {"iou": 0.9, "max_det": 90})):
        seen.clear()
        GID(checkpoint).val(data=str(data), imgsz=64, plots=False, **given)
        found = torch.cat(seen)
        counts[name] = len(found)
        assert found.min() > given.get("conf", 0.1)
        assert len(found) <= 4 * given.get("max_det", 30)
    assert counts["conf"] > counts["own"] < counts["iou"]


@pytest.mark.parametrize("given", [{}, {"conf": 0.02, "iou": 0.7, "max_det": 50}, {"max_det": 5}])
def test_a_file_holds_the_limits_it_was_exported_with(checkpoint, image, tmp_path, given):
    copy = tmp_path / "best.pt"
    copy.write_bytes(checkpoint.read_bytes())
    model = GID(copy)
    path = model.export(imgsz=64, **given)
    limits = {**OWN, **given}
    rows = oracle(checkpoint, image, **limits)
    ours = GID(copy)
    ours.predict(image, imgsz=64, verbose=False)
    images = ours.predictor.preprocess(ours.predictor.batch[1]).numpy()
    found = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"images": images})[0][0]
    assert found.shape == (limits["max_det"], 6)
    torch.testing.assert_close(torch.from_numpy(found[found[:, 4] > 0]), rows, rtol=1e-4, atol=1e-2)
    nms = [node for node in onnx.load(path).graph.node if node.op_type == "NonMaxSuppression"]
    assert len(nms) == 2  # of the proposals and of the detections
    assert model.model.detector.max_det == 30


def test_dense_detectors_are_left_alone():
    model = GIDDetectionModel("retina_nano", nc=2, verbose=False)
    before = dict(vars(model.detector))
    with limited(model, conf=0.9, iou=0.9, max_det=1):
        assert vars(model.detector) == before
