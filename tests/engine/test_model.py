"""`GID` in Python: the modes, and the ONNX file against the checkpoint."""

import json
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from gid_yolo import GID
from gid_yolo.engine.coco_eval import COLUMNS
from gid_yolo.engine.detection_model import GIDDetectionModel, fold_batch_norm


@pytest.fixture(scope="module")
def onnx_file(teacher, tmp_path_factory):
    copy = tmp_path_factory.mktemp("onnx") / "best.pt"
    copy.write_bytes(teacher.read_bytes())
    return Path(GID(copy).export(imgsz=64))


def letterboxed(data) -> np.ndarray:
    images = [cv2.imread(str(p))[..., ::-1] for p in sorted((data.parent / "images" / "val").iterdir())]
    return np.stack(images).transpose(0, 3, 1, 2).astype(np.float32) / 255


def test_onnx_equals_pytorch(onnx_file, data):
    session = ort.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    model = GID(onnx_file.with_suffix(".pt")).model.eval()
    for image in letterboxed(data):
        found = session.run(None, {"images": image[None]})[0]
        with torch.no_grad():
            expected = model(torch.from_numpy(image[None]))[0].numpy()
        assert found.shape == expected.shape
        assert np.abs(found[:, :4] - expected[:, :4]).max() < 0.05  # px
        assert np.abs(found[:, 4:] - expected[:, 4:]).max() < 1e-3


def test_dynamic_onnx_follows_its_input(teacher, tmp_path):
    copy = tmp_path / "best.pt"
    copy.write_bytes(teacher.read_bytes())
    file = GID(copy).export(imgsz=64, dynamic=True)
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    model = GID(copy).model.eval()
    for shape in ((1, 3, 64, 64), (3, 3, 96, 160)):
        images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = model(images)[0].numpy()
        assert np.abs(session.run(None, {"images": images.numpy()})[0] - expected).max() < 0.05


def test_onnx_carries_ultralytics_metadata(onnx_file):
    meta = {p.key: p.value for p in onnx.load(onnx_file).metadata_props}
    assert meta["task"] == "detect"
    assert meta["names"] == str({0: "a", 1: "b"})
    assert meta["imgsz"] == "[64, 64]"
    assert meta["end2end"] == "False"


def test_validation_of_the_onnx_file_equals_that_of_the_checkpoint(onnx_file, data):
    columns = []
    for file in (onnx_file.with_suffix(".pt"), onnx_file):
        model = GID(file)
        model.val(data=str(data), imgsz=64, conf=0.001, plots=False, rect=False)
        columns.append(model.columns)
        saved = json.loads(next(Path("runs").rglob("coco_metrics.json")).read_text())
        assert {key: saved[key] for key in COLUMNS} == model.columns
    assert columns[0] == pytest.approx(columns[1], abs=0.1)


def test_ultralytics_own_model_runs_the_onnx_file(onnx_file, data):
    from ultralytics import YOLO

    ours = GID(onnx_file)
    ours.val(data=str(data), imgsz=64, conf=0.001, iou=0.5, plots=False, rect=False)
    stock = YOLO(str(onnx_file), task="detect").val(data=str(data), imgsz=64, conf=0.001, iou=0.5, plots=False)
    assert stock.box.map == pytest.approx(ours.metrics.box.map, abs=1e-3)


def test_predictions_lie_in_the_image(teacher, data):
    results = GID(teacher).predict(str(data.parent / "images" / "val"), imgsz=64, conf=0.001, verbose=False)
    assert len(results) == 4
    for result in results:
        assert result.names == {0: "a", 1: "b"}
        assert len(result.boxes) > 0
        assert float(result.boxes.xyxy.min()) >= 0
        assert float(result.boxes.xyxy.max()) <= 64


def test_a_checkpoint_can_be_trained_further(teacher, data):
    model = GID(teacher)
    model.train(data=str(data), epochs=1, imgsz=64, batch=4, plots=False)
    assert model.model.yaml["settings"]["fpn_channels"] == 96
    assert str(teacher) in model.model.record["initialised_from"]


@pytest.mark.parametrize("backbone", ["mobilenetv2_035", "resnet18", "tf_efficientnet_lite0", "mobilenetv3_small_050"])
def test_folding_batch_norm_keeps_the_outputs(backbone):
    model = GIDDetectionModel(
        {**GIDDetectionModel("retina_nano", verbose=False).yaml, "backbone": backbone}, verbose=False
    )
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics that are not the identity's
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    body = model.detector.backbone.body.eval()
    images = torch.rand(2, 3, 64, 96, generator=generator)
    with torch.no_grad():
        before = body(images)
        norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in body.modules())
        after = fold_batch_norm(body)(images)
    assert norms > 0
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in body.modules())
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max()))


def test_help_and_version_need_no_model(capsys):
    from gid_yolo.cli import main

    assert main(["--version"]) == 0
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "gid-train" in out
    assert "gid_top_k: 10" in out
