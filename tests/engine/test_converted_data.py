"""Runs on data that were converted or drawn into the cache go on when the cache is gone."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from engine_helpers import FAST, train_one_epoch, write_data

from gid_yolo import GID
from gid_yolo.cli import main
from gid_yolo.data import prepare_data
from gid_yolo.data.synthetic import is_embedded, synthetic_dataset
from gid_yolo.engine.data_set import resolve_data
from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.errors import UserError

SIDE = 64


def coco(root: Path) -> Path:
    """The tiny data set as COCO JSON."""
    data = write_data(root / "set")
    contents = {"names": ["a", "b"]}
    for split in ("train", "val"):
        images, annotations = [], []
        for file in sorted((data.parent / "images" / split).iterdir()):
            number, x, y, w, h = map(float, (data.parent / "labels" / split / f"{file.stem}.txt").read_text().split())
            images.append({"id": len(images), "file_name": file.name, "width": SIDE, "height": SIDE})
            box = [(x - w / 2) * SIDE, (y - h / 2) * SIDE, w * SIDE, h * SIDE]
            annotations.append({"id": len(annotations), "image_id": images[-1]["id"], "category_id": int(number)})
            annotations[-1]["bbox"] = box
        names = [{"id": i, "name": name} for i, name in enumerate("ab")]
        (root / f"{split}.json").write_text(
            json.dumps({"images": images, "annotations": annotations, "categories": names})
        )
        contents[split] = {"images": f"set/images/{split}", "annotations": f"{split}.json"}
    (root / "coco.yaml").write_text(yaml.safe_dump(contents))
    return root / "coco.yaml"


def test_a_run_on_coco_json_goes_on(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GID_CACHE", str(tmp_path / "cache"))
    data = coco(tmp_path)
    trainer = GIDTrainer(overrides={**FAST, "model": "retina_nano", "data": str(prepare_data(data)), "epochs": 2})
    train_one_epoch(trainer)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(UserError, match=r"names data that is not here .* give data="):
        GID(trainer.last).train(resume=True)
    GID(trainer.last).train(resume=True, data=str(data))  # as it was given when the run began
    assert (trainer.save_dir / "coco_metrics.json").is_file()


def test_the_embedded_data_are_drawn_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("gid_yolo.data.synthetic.COUNTS", {"train": 8, "val": 4, "test": 4})
    for cache in ("first", "second"):
        monkeypatch.setenv("GID_CACHE", str(tmp_path / cache))
        if cache == "first":
            data = synthetic_dataset()
            assert is_embedded(data)
            trainer = GIDTrainer(overrides={**FAST, "model": "retina_nano", "data": str(data), "epochs": 2})
            train_one_epoch(trainer)
            shutil.rmtree(tmp_path / "first")
    assert main(["train", "resume=True", f"model={trainer.last}"]) == 0
    assert (tmp_path / "second" / "synthetic-v1" / "data.yaml").is_file()
    assert main(["val", f"model={trainer.best}", "plots=False"]) == 0
    args = yaml.safe_load((trainer.save_dir / "args.yaml").read_text())
    assert resolve_data(args["data"]) == tmp_path / "second" / "synthetic-v1" / "data.yaml"
    assert resolve_data(str(data)) == tmp_path / "second" / "synthetic-v1" / "data.yaml"  # as cfg=args.yaml has it


def test_other_data_that_are_gone_stay_gone(tmp_path) -> None:
    assert not is_embedded(tmp_path / "synthetic" / "data.yaml")
    assert not is_embedded(None)
    with pytest.raises(UserError, match="does not exist"):
        resolve_data(tmp_path / "gone" / "data.yaml")


def test_labels_that_lie_elsewhere(tmp_path, capsys) -> None:
    data = write_data(tmp_path / "set")
    (data.parent / "labels").rename(data.parent / "annotations")
    assert main(["train", "model=retina_nano", f"data={data}", "epochs=1", "imgsz=64"]) == 2
    text = capsys.readouterr().err
    assert f"split=train of data={data} has no labels: check that labels/ lies beside images/" in text


def test_images_that_would_become_too_small(data, capsys) -> None:
    # 8 images in batches of 7 leave one alone, which at 32 px a batch norm could not divide by its variance
    words = ["model=retina_nano", f"data={data}", "epochs=1", "imgsz=64", "batch=7", "multi_scale=0.5"]
    assert main(["train", *words]) == 2
    assert "batch=7 cannot be trained: final batch=1 training at imgsz=32" in capsys.readouterr().err
