"""gid-val, gid-predict and gid-export with ONNX files: their own size and classes, and nothing said in silence."""

import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from ultralytics.utils import nms

from gid_yolo import GID
from gid_yolo.cli import main
from gid_yolo.errors import UserError
from gid_yolo.export.session import OnnxDetector


@pytest.fixture(scope="module")
def files(teachers, tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of 64 px, a fixed file of 64 x 96, and one that leaves its size open, made for 64 x 96."""
    folder = tmp_path_factory.mktemp("files")
    shutil.copy(teachers["retina_nano"], folder / "a.pt")
    found = {"pt": folder / "a.pt"}
    for name, dynamic in (("fixed", False), ("open", True)):
        found[name] = folder / f"{name}.onnx"
        assert GID(found["pt"]).export(imgsz=[64, 96], dynamic=dynamic, file=found[name]) == str(found[name])
    return found


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> str:
    file = str(tmp_path_factory.mktemp("image") / "a.png")
    cv2.imwrite(file, np.random.default_rng(0).integers(0, 255, (80, 120, 3), dtype=np.uint8))
    return file


def sentence(capsys, *words: str) -> str:
    capsys.readouterr()
    assert main(list(words)) == 2
    return capsys.readouterr().err


def other_classes(data: Path, folder: Path, names: list[str]) -> str:
    contents = yaml.safe_load(data.read_text()) | {"path": str(data.parent), "names": names}
    file = folder / "other.yaml"
    file.write_text(yaml.safe_dump(contents))
    return str(file)


def test_a_file_that_leaves_its_size_open_runs_at_its_own(files, data, image, monkeypatch) -> None:
    shapes = []
    run = onnxruntime.InferenceSession.run

    def noted(self, names, feed, *args):
        shapes.extend(tuple(x.shape[2:]) for x in feed.values())
        return run(self, names, feed, *args)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", noted)
    GID(files["open"]).predict(image, verbose=False)
    assert set(shapes) == {(64, 96)}
    shapes.clear()
    GID(files["open"]).val(data=str(data), plots=False, batch=1)
    # The validator takes one side, 96, and pads squares to it and half a stride: ceil(96 / 32 + 0.5) * 32; it warms up
    # at 640
    assert set(shapes) - {(640, 640)} == {(128, 128)}
    shapes.clear()
    GID(files["open"]).predict(image, imgsz=128, verbose=False)
    assert (96, 128) in shapes  # 80 x 120 at 128: 85.3 x 128, to multiples of 32


@pytest.mark.parametrize("mode", ["val", "predict"])
def test_another_size_than_the_only_one_is_refused(capsys, files, data, image, mode) -> None:
    more = {"val": f"data={data}", "predict": f"source={image}"}[mode]
    text = sentence(capsys, mode, f"model={files['fixed']}", more, "imgsz=128")
    assert "imgsz=128" in text
    assert "takes 64x96 and no other size" in text
    GID(files["fixed"]).predict(image, imgsz=[64, 90], verbose=False)  # rounded up to the stride it is its own


@pytest.mark.parametrize("names", [["b", "a"], ["a", "c"], ["a", "b", "c"]])
def test_data_of_other_classes_are_refused(capsys, files, data, tmp_path, names) -> None:
    path = other_classes(data, tmp_path, names)
    text = sentence(capsys, "val", f"model={files['open']}", f"data={path}")
    assert f"knows 2 classes (a, b), but data={path} has {len(names)} ({', '.join(names)})" in text
    assert "in their order" in text


def test_classes_are_those_of_the_file(capsys, files, image) -> None:
    for given in ("a", "7"):
        text = sentence(capsys, "predict", f"model={files['fixed']}", f"source={image}", f"classes={given}")
        assert "must be ids of the classes that exist: 0 (a), 1 (b)" in text


def test_no_image_of_a_batch_is_left_out_for_its_time(files, data, tmp_path, monkeypatch) -> None:
    # By the clock of this test every image takes 100 s, where a batch of 4 has 2.2
    found = []
    for step in (0.0, 100.0):
        now = itertools.count(0.0, step)
        model = GID(files["pt"])
        with monkeypatch.context() as patched:
            patched.setattr(nms, "time", SimpleNamespace(time=lambda now=now: next(now)))
            model.val(data=str(data), imgsz=64, batch=4, conf=0.0, plots=False, project=str(tmp_path), exist_ok=True)
        rights = np.load(tmp_path / "val" / "coco_matches.npz")
        found.append((model.columns, {name: rights[name].tolist() for name in rights.files}))
    assert found[0] == found[1]
    assert sum(map(len, found[0][1].values())) > 100


def test_a_source_that_cannot_be_read_is_no_success(capsys, files, image, tmp_path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_text("no image")
    assert "no image could be decoded" in sentence(capsys, "predict", f"model={files['pt']}", "source=broken")
    shutil.copy(image, tmp_path / "broken")
    assert main(["predict", f"model={files['pt']}", "source=broken", "imgsz=64"]) == 0  # one of two


def test_what_only_yolo_has_is_refused(capsys, files, image) -> None:
    text = sentence(capsys, "predict", f"model={files['pt']}", f"source={image}", "visualize=True")
    assert "visualize= reads layers of a YOLO" in text
    assert "embed= is not an argument of a command" in sentence(
        capsys, "predict", f"model={files['pt']}", f"source={image}", "embed=[0]"
    )
    with pytest.raises(UserError, match="embed= reads layers of a YOLO"):
        GID(files["pt"]).embed(image)


def test_the_file_to_write(capsys, files, tmp_path) -> None:
    assert main(["export", f"model={files['pt']}", "imgsz=64", "file=new/folder/b.onnx"]) == 0
    assert OnnxDetector("new/folder/b.onnx", provider="cpu").info.size == (64, 64)
    assert not files["pt"].with_suffix(".onnx").exists()
    assert "must be a file that ends in .onnx" in sentence(capsys, "export", f"model={files['pt']}", "file=b.pt")
    assert "file=7 must be a text" in sentence(capsys, "export", f"model={files['pt']}", "file=7")


def test_a_place_that_cannot_be_written_to(files, monkeypatch, tmp_path) -> None:
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path / "ro" / ".export-abc"))

    monkeypatch.setattr("gid_yolo.export.to_onnx.tempfile.TemporaryDirectory", refuse)
    with pytest.raises(
        UserError, match=r"ro cannot be written to \(Permission denied\): name another place, e\.g\. file=out/a\.onnx"
    ):
        GID(files["pt"]).export(imgsz=64, file=tmp_path / "ro" / "a.onnx")


@pytest.mark.parametrize("limits", [{"iou": 1}, {"conf": 0}, {"iou": 0, "conf": 0}])
def test_limits_that_are_whole_numbers(files, tmp_path, limits) -> None:
    file = GID(files["pt"]).export(imgsz=64, nms=True, file=tmp_path / "nms.onnx", **limits)
    assert OnnxDetector(file, provider="cpu").info.limits.items() >= {k: float(v) for k, v in limits.items()}.items()


def test_numpys_numbers_are_numbers(files, image) -> None:
    found = OnnxDetector(
        files["open"], provider="cpu", conf=np.float32(0.5), max_det=np.int64(3), imgsz=(np.int64(64), 96)
    )
    assert (found.conf, found.max_det, found.size) == (0.5, 3, (64, 96))
    for file in (files["pt"], files["open"]):
        (result,) = GID(file).predict(
            image, imgsz=np.int64(96), conf=np.float32(0.0), max_det=np.int64(3), verbose=False
        )
        assert len(result.boxes) == 3


def test_a_file_without_an_ending(files, tmp_path) -> None:
    shutil.copy(files["pt"], "weights")
    with pytest.raises(UserError, match=r"model=weights is a file without an ending: rename it to weights\.pt"):
        GID("weights")


def test_the_benchmarks_data_are_those_of_the_model(files, monkeypatch) -> None:
    given = {}
    monkeypatch.setattr("gid_yolo.export.benchmark.benchmark", lambda **kwargs: given.update(kwargs))
    GID(files["pt"]).benchmark()
    assert given["data"] == torch.load(files["pt"], weights_only=False)["train_args"]["data"]
    GID(files["pt"]).benchmark(data="other.yaml")
    assert given["data"] == "other.yaml"
