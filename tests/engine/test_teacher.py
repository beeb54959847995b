"""Where a teacher is looked for, and what a class mapping says."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from engine_helpers import FAST, train_one_epoch, write_data
from ultralytics.utils import LOGGER

from gid_yolo.cli import main
from gid_yolo.engine.checkpoint import fingerprint, load_model
from gid_yolo.engine.teacher import (
    best_finished_run,
    find_finished_run,
    finished_runs,
    image_files,
    loaded_share,
    resolve_teacher,
    share_classes,
)
from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.errors import UserError

ANY = {"teacher_min_ap": 0}


def test_classes_are_shared_by_name_in_the_students_order():
    assert share_classes({0: "a", 1: "b"}, {0: "a", 1: "b"}) is None
    shared = share_classes({0: "cat", 1: "Person", 2: "dog"}, {0: "dog", 1: "person"})
    assert (shared.student, shared.teacher) == ([0, 1], [2, 1])


def test_a_class_the_teacher_lacks_is_left_out_and_said(monkeypatch):
    lines = []
    monkeypatch.setattr(LOGGER, "warning", lambda text: lines.append(text))
    shared = share_classes({0: "a", 1: "b"}, {0: "c", 1: "b", 2: "a"})
    assert (shared.student, shared.teacher) == ([1, 2], [1, 0])
    assert "does not know c of the 3 classes" in lines[0]
    with pytest.raises(UserError, match=r"none of the 2 that are trained \(c, d\)"):
        share_classes({0: "a", 1: "b"}, {0: "c", 1: "d"})


def test_classes_that_are_not_trained_are_left_out():
    coco = dict(enumerate(("person", "bicycle", "car")))
    shared = share_classes(coco, coco, [2, 0])
    assert (shared.student, shared.teacher) == ([0, 2], [0, 2])
    shared = share_classes(coco, {0: "car", 1: "person"}, [1])
    assert (shared.student, shared.teacher) == ([1], [0])


def test_all_tensors_of_an_intact_teacher_are_loaded(teacher):
    model, _ = load_model(teacher)
    loaded, wanted = loaded_share(model)
    assert loaded == wanted == len(model.state_dict())
    model.detector.head.cls_logits = torch.nn.Conv2d(96, 7, 3)  # 7 is not 9 anchors x 2 classes
    assert loaded_share(model) == (wanted - 2, wanted)  # weight and bias


def test_the_fingerprint_tells_weights_apart(teacher):
    model, _ = load_model(teacher)
    before = fingerprint(model)
    assert fingerprint(load_model(teacher)[0]) == before
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    assert fingerprint(model) != before


def test_images_are_counted_in_folders_and_lists(data, tmp_path):
    folder = data.parent / "images" / "train"
    listed = tmp_path / "some.txt"
    listed.write_text("\n".join(str(p) for p in sorted(folder.iterdir())[:3]))
    assert len(image_files(str(folder))) == 8
    assert len(image_files([str(folder), str(listed)])) == 8 + 3


def test_a_file_in_the_working_folder_comes_first(data, teacher):
    shutil.copy(teacher, "retina_small.pt")
    assert resolve_teacher("retina_small", data, {}) == Path("retina_small.pt").resolve()


def test_a_finished_run_on_the_same_data_is_found_and_no_other(data, tmp_path):
    trainer = GIDTrainer(overrides={**FAST, "model": "retina_nano", "data": str(data)})
    trainer.train()
    assert find_finished_run("retina_nano", data, ANY) == trainer.best.resolve()
    assert resolve_teacher("retina_nano", data, {"teacher_min_ap": 0}) == trainer.best.resolve()
    assert find_finished_run("retina_small", data, ANY) is None
    assert find_finished_run("retina_nano", write_data(tmp_path / "elsewhere"), ANY) is None
    metrics = trainer.save_dir / "coco_metrics.json"
    found = metrics.read_text()
    metrics.write_text("[1, 2")
    assert best_finished_run("retina_nano", data) is None
    metrics.write_text(found)
    worse = trainer.save_dir.with_name("worse")
    shutil.copytree(trainer.save_dir, worse)
    damaged = trainer.save_dir.with_name("damaged")
    shutil.copytree(trainer.save_dir, damaged)
    (damaged / "args.yaml").write_text("model: [")
    for of, ap in ((trainer.save_dir, 7.0), (worse, 3.0), (damaged, 9.0)):
        (of / "coco_metrics.json").write_text(json.dumps({**json.loads(found), "mAP": ap}))
    assert find_finished_run("retina_nano", data, ANY) == trainer.best.resolve()  # the best, not the newest
    for least in (7, None):
        assert resolve_teacher("retina_nano", data, {"teacher_min_ap": least}) == trainer.best.resolve()
    with pytest.raises(UserError, match=r"\(mAP 7\.0, 1 epochs at 64 px\), .*best\.pt, is under teacher_min_ap=7\.5"):
        resolve_teacher("retina_nano", data, {"teacher_min_ap": 7.5})
    shutil.rmtree(worse)
    metrics.unlink()  # as if it had been interrupted
    assert find_finished_run("retina_nano", data, ANY) is None


def test_a_teacher_that_does_not_exist_is_announced_trained_and_kept(data, monkeypatch):
    from gid_yolo import GID

    said = []
    info = LOGGER.info
    monkeypatch.setattr(LOGGER, "info", lambda text="", *a, **k: (said.append(str(text)), info(text, *a, **k)))
    model = GID("retina_nano")
    model.train(data=str(data), teacher="retina_nano", **FAST)
    announcement = next(text for text in said if "is trained first" in text)
    assert "1 epochs of 8 images at 64 px" in announcement
    assert "teacher_retina_nano" in announcement
    kept = find_finished_run("retina_nano", data, ANY)
    assert "teacher_retina_nano" in str(kept)
    assert model.model.record["teacher"] == str(kept)
    args, again = kept.parent.parent / "args.yaml", kept.parent.parent / "again"
    assert main(["train", f"cfg={args}", f"save_dir={again}"]) == 0  # its pace, measured first, draws no number of its
    repeated = load_model(again / "weights" / "best.pt")[0].state_dict()
    assert all(torch.equal(repeated[key], value) for key, value in load_model(kept)[0].state_dict().items())
    shutil.rmtree(again)

    said.clear()
    GID("retina_nano").train(data=str(data), teacher="retina_nano", **FAST)
    assert any("found a finished run" in text for text in said)
    assert not any("is trained first" in text for text in said)


def test_a_plain_run_that_comes_near_the_teacher_is_named(data, teacher, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(LOGGER, "warning", lambda text, *_: said.append(str(text)))
    plain = GIDTrainer(overrides={**FAST, "model": "retina_nano", "data": str(data)})
    plain.train()
    metrics = plain.save_dir / "coco_metrics.json"
    found = json.loads(metrics.read_text())
    assert best_finished_run("retina_nano", data) == (found["mAP"], plain.best.resolve())
    distilled = {**FAST, "model": "retina_nano", "data": str(data), "teacher": str(teacher)}
    GIDTrainer(overrides={**distilled, "save_dir": str(tmp_path / "first")}).train()
    assert any("a plain run of this student" in text and str(plain.best) in text for text in said)
    said.clear()
    metrics.write_text(json.dumps({**found, "mAP": -50.0}))  # 50 under a teacher of 0 or more
    GIDTrainer(overrides={**distilled, "save_dir": str(tmp_path / "second")}).train()
    assert not any("a plain run of this student" in text for text in said)


def test_a_teacher_of_one_class_is_of_one_class(data):
    from gid_yolo import GID

    settings = {**FAST, "single_cls": True, "data": str(data)}
    GID("retina_nano").train(**settings, teacher="retina_nano")
    (found,) = finished_runs("retina_nano", data, single_cls=True)
    assert "teacher_retina_nano" in str(found)
    assert finished_runs("retina_nano", data) == []
    assert resolve_teacher("retina_nano", data, {"teacher_min_ap": 0, "single_cls": True}) == found


def test_a_run_of_the_teacher_that_was_stopped_is_named(data, caplog):
    trainer = GIDTrainer(overrides={**FAST, "model": "retina_nano", "data": str(data), "epochs": 2})
    train_one_epoch(trainer)
    resolve_teacher("retina_nano", data, dict(FAST))
    assert f"unless a process is at it, gid-train resume=True model={trainer.last.resolve()} goes on" in caplog.text


@pytest.mark.parametrize("least", [0, 1.0])
def test_a_teacher_that_no_image_measures(data, teacher, tmp_path, caplog, least):
    empty = tmp_path / "empty"
    shutil.copytree(data.parent, empty)
    for label in (empty / "labels" / "val").iterdir():
        label.write_text("")
    settings = {**FAST, "model": "retina_nano", "data": str(empty / "data.yaml"), "teacher": str(teacher)}
    trainer = GIDTrainer(overrides={**settings, "teacher_min_ap": least})
    if least:
        with pytest.raises(UserError, match="cannot be measured: none of 4 validation images shows an object"):
            trainer.train()
    else:
        trainer.train()
        assert "NOT MEASURED: no object of a class that it knows on 4 validation images" in caplog.text
    assert "4, WITHOUT OBJECTS" in caplog.text or least
