"""Conversion of real VOC and COCO data, against labels that others made from the same sources."""

import json
import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from gid_yolo.data import prepare_data

DATASETS = Path(__file__).resolve().parents[3] / "shared" / "datasets"


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GID_CACHE", str(tmp_path / "cache"))


def dataset(name: str) -> Path:
    if not (DATASETS / name).is_dir():
        pytest.skip(f"the real data set {name} is not beside this checkout (shared/datasets/{name})")
    return DATASETS / name


def class_names(path: Path) -> list[str]:
    names = yaml.safe_load(path.read_text())["names"]
    return [names[index] for index in range(len(names))]


def read_labels(path: Path, names: list[str]) -> list[tuple[str, np.ndarray]]:
    """Rows of a label file as (class name, xyxy in shares of the image)."""
    rows = []
    for line in path.read_text().splitlines():
        index, *box = line.split()
        x, y, w, h = map(float, box)
        rows.append((names[int(index)], np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])))
    return rows


def test_bccd_equals_its_labels() -> None:
    """The labels were made from the same XML: same classes in the same order, every edge within a pixel."""
    root = dataset("bccd")
    out = prepare_data(root)
    names, expected_names = class_names(out), class_names(root / "bccd.yaml")
    assert names == sorted(expected_names)
    compared = 0
    for split in ("train", "val", "test"):
        expected_files = sorted((root / "labels" / split).glob("*.txt"))
        assert [p.name for p in sorted((out.parent / "labels" / split).iterdir())] == [p.name for p in expected_files]
        for path in expected_files:
            rows = read_labels(out.parent / "labels" / split / path.name, names)
            expected = read_labels(path, expected_names)
            assert [name for name, _ in rows] == [name for name, _ in expected]
            for (_, box), (_, other) in zip(rows, expected, strict=True):
                # 640x480; the files agree to their six digits, half a pixel would show another convention.
                np.testing.assert_allclose(box, other, atol=0.5 / 640)
                compared += 1
        image = next((out.parent / "images" / split).iterdir())
        assert cv2.imread(str(image)).shape == (480, 640, 3)
    assert compared > 1000


@pytest.fixture
def coco_yaml(tmp_path: Path) -> Path:
    root = dataset("coco_subset")
    data = {
        "train": {"images": str(root / "images/train"), "annotations": str(root / "annotations/instances_train.json")},
        "val": str(root / "images/val"),
    }
    path = tmp_path / "coco.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_coco_equals_its_labels(coco_yaml: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = dataset("coco_subset")
    with caplog.at_level(logging.INFO, "gid_yolo"):
        out = prepare_data(coco_yaml)
    names = class_names(out)
    assert names == class_names(root / "coco_subset.yaml")
    source = json.loads((root / "annotations/instances_train.json").read_text())
    crowd = sum(a["iscrowd"] for a in source["annotations"])
    written = 0
    for image in source["images"]:
        name = Path(image["file_name"]).with_suffix(".txt").name
        rows = read_labels(out.parent / "labels/train" / name, names)
        path = root / "labels/train" / name
        expected = read_labels(path, names) if path.exists() else []
        assert len(rows) == len(expected)
        for label, box in rows:  # the orders of the files differ
            nearest = min((o for other, o in expected if other == label), key=lambda o: np.abs(o - box).max())
            np.testing.assert_allclose(box, nearest, rtol=1e-3, atol=1e-5)
        written += len(rows)
    assert crowd > 0
    assert written + crowd == len(source["annotations"])
    assert f"128 train images, {written} boxes in train, 80 classes; left out: {crowd} iscrowd" in caplog.text
    assert yaml.safe_load(out.read_text())["val"] == str((root / "images/val").resolve())
