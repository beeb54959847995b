"""docs/deploy.md: its examples run, and its script is the file that is tested."""

import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from runtime_helpers import export, picture

from gid_yolo.export.providers import PROVIDERS
from gid_yolo.export.session import OnnxDetector

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "detect.py"
TEXT = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
FILES = {
    "retina_nano": {"batch": 2},
    "fcos_nano": {"dynamic": True},
    "frcnn_nano": {},
    "yolo11n.yaml": {"nms": True, "conf": 1e-7},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("deploy")
    for name, shape in (("a.jpg", (70, 131)), ("b.jpg", (131, 70))):
        cv2.imwrite(str(path / name), picture(*shape))
    return path


@pytest.mark.parametrize("name", FILES)
def test_the_script_finds_what_the_package_finds(folder, name):
    path = export(folder, name, [96, 128], **FILES[name])
    detector = OnnxDetector(path, provider="cpu", rect=False, iou=0.5)
    output = detector.run(detector.prepare([picture(70, 131)]))[0]
    scores = output[:, 4] if detector.info.final else output[4:].max(0)
    detector.conf = float(np.sort(scores)[-80:][0])
    for image in ("a.jpg", "b.jpg"):
        (found,) = detector(folder / image)
        assert len(found) > 3
        command = [sys.executable, str(SCRIPT), str(path), str(folder / image), repr(detector.conf), "0.5"]
        lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
        assert [line.split()[0] for line in lines] == found.labels
        rows = np.array([[float(word) for word in line.split()[1:]] for line in lines])
        np.testing.assert_allclose(rows[:, 0], found.scores, atol=6e-4)
        height, width = picture(70, 131).shape[:2] if image == "a.jpg" else (131, 70)
        np.testing.assert_allclose(rows[:, 1:].clip(0, [width, height] * 2), found.boxes, atol=0.06)


def run_script(*words):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True, timeout=60)


def test_the_script_takes_one_image_size_and_the_iou_of_the_file(folder):
    path = export(folder, "retina_nano", [96, 96], dynamic=True, settle=True, iou=0.2)
    detector = OnnxDetector(path, provider="cpu", rect=False)
    assert detector.iou == 0.2  # not the family's
    output = detector.run(detector.prepare([picture(70, 131)]))[0]
    detector.conf = float(np.sort(output[4:].max(0))[-150:][0])
    model = onnx.load(path)
    for entry in model.metadata_props:
        if entry.key == "imgsz":
            entry.value = "96"
    onnx.save(model, path)
    (found,) = detector(folder / "a.jpg")
    detector.iou = 0.5
    assert len(detector(folder / "a.jpg")[0]) > len(found)  # the threshold matters
    assert len(run_script(path, folder / "a.jpg", repr(detector.conf)).stdout.splitlines()) == len(found)


def test_the_script_says_that_an_image_is_missing(folder):
    path = export(folder, "retina_nano", [96, 128])
    done = run_script(path, folder / "none.jpg")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"{folder / 'none.jpg'} is not an image that OpenCV can read."
    assert "Traceback" not in done.stderr


def test_the_script_needs_nothing_else():
    imports = re.findall(r"^(?:import|from) (\w+)", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(imports) == {"ast", "sys", "cv2", "numpy", "onnxruntime"}


def test_the_page_holds_the_script():
    assert SCRIPT.read_text(encoding="utf-8") in BLOCKS


def test_the_examples_of_the_page_run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    export(folder, "frcnn_nano", [96, 128]).rename("best.onnx")
    names: dict = {}
    for block in BLOCKS:
        if block != SCRIPT.read_text(encoding="utf-8"):
            exec(block, names)
    assert "OnnxDetector(best.onnx: 3 classes, 96x128, runs on " in capsys.readouterr().out
    assert len(names["found"]) == 2


def test_the_table_of_providers_is_complete():
    rows = re.findall(r"^\| (`[a-z].*?) \| `(\w+ExecutionProvider)` \|", TEXT, re.MULTILINE)
    assert {cell.split("`")[1]: name for cell, name in rows} == PROVIDERS


def test_linked_files_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not link.startswith("http")]
    assert links
    assert all((ROOT / "docs" / link).is_file() for link in links)
