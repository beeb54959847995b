"""Training, distilling, resuming: what the checkpoints hold and what the logs say."""

import csv
import math
import struct
import zlib

import cv2
import pytest
import torch
from engine_helpers import FAST, train_one_epoch, write_data
from ultralytics.utils import LOGGER

from gid_yolo.cli import main
from gid_yolo.engine.checkpoint import load_any, load_model
from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.engine.instance_counts import COUNT_NAMES, read_counts
from gid_yolo.engine.provenance import digest_of_labels
from gid_yolo.engine.teacher_student import TeacherStudentModel
from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.errors import UserError


def train(data, **overrides):
    trainer = GIDTrainer(overrides={"model": "retina_nano", **FAST, "data": str(data), **overrides})
    trainer.train()
    return trainer


TWENTY = {"epochs": 10, "nbs": 4, "warmup_epochs": 1, "mosaic": 0.5, "fliplr": 0.5, "seed": 7}


def results(trainer):
    with trainer.csv.open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture
def log(monkeypatch):
    lines = []
    monkeypatch.setattr(LOGGER, "info", lambda text="", *args, **kwargs: lines.append(str(text)))
    return lines


def test_plain_training_writes_a_student_and_its_ten_columns(data):
    trainer = train(data)
    model, _ = load_model(trainer.best)
    assert model.names == {0: "a", 1: "b"}
    assert model.record["epochs"] == 1
    loaded = trainer.train_loader.dataset.labels
    assert model.record["train_images"] == digest_of_labels(loaded, {0: "a", 1: "b"})
    assert (trainer.save_dir / "coco_metrics.json").is_file()
    assert set(results(trainer)[0]) >= {"train/cls_loss", "train/box_loss"}


def test_distillation_logs_every_term_and_keeps_the_student_alone(data, teacher, log):
    trainer = train(data, teacher=str(teacher), epochs=2)
    for row in results(trainer):
        for name in ("feat_loss", "rel_loss", "resp_loss"):
            assert row[f"train/{name}"] > 0
    model, _ = load_any(trainer.best)
    assert type(model) is GIDDetectionModel
    assert not any("projector" in key or "teacher" in key for key in model.state_dict())
    text = "\n".join(log)
    assert "teacher tensors" in text
    assert "First step" in text


def test_the_types_of_the_instances_are_counted_and_drawn(data, teacher):
    trainer = train(data, teacher=str(teacher), epochs=2, plots=True)
    counts = read_counts(trainer.save_dir / "gi_types.csv")
    # 8 images in batches of 4: two iterations an epoch
    assert [row[0] for row in counts] == [1, 2, 3, 4]
    assert all(0 < sum(row[1:]) <= 10 for row in counts)  # K = 10, less those that are of no type
    for epoch, row in enumerate(results(trainer)):
        for column, name in enumerate(COUNT_NAMES, 1):
            mean = sum(line[column] for line in counts[2 * epoch : 2 * epoch + 2]) / 2
            assert row[f"train/{name}"] == pytest.approx(mean, abs=1e-4)
    assert cv2.imread(str(trainer.save_dir / "gi_types.png")) is not None


def test_the_types_that_are_distilled_can_be_chosen(data, teacher):
    seen = []
    trainer = GIDTrainer(
        overrides={"model": "retina_nano", **FAST, "data": str(data), "teacher": str(teacher), "gid_types": "semi+neg"}
    )
    trainer.add_callback("on_train_batch_end", lambda t: seen.append(t.model.instances))
    trainer.train()
    for found in seen:
        assert set(found.types[found.valid].tolist()) <= {1, 2}


def test_the_ground_truth_can_be_distilled(data, teacher):
    trainer = train(data, teacher=str(teacher), gid_types="gt")
    assert results(trainer)[0]["train/feat_loss"] > 0
    assert results(trainer)[0]["train/gi_pos"] == 1.0  # every image of this data has one object
    assert results(trainer)[0]["train/gi_neg"] == 0.0


@pytest.mark.parametrize("who", ["teacher", "student"])
@pytest.mark.parametrize(
    ("layer", "value"), [("box_deltas", math.nan), ("box_deltas", math.inf), ("cls_logits", math.inf)]
)
def test_a_model_that_predicts_no_numbers_is_named(data, teacher, who, layer, value):
    trainer = GIDTrainer(overrides={"model": "retina_nano", **FAST, "data": str(data), "teacher": str(teacher)})

    def break_it(t):
        broken = t.model.teacher_model if who == "teacher" else t.model.student_model
        with torch.no_grad():
            getattr(broken.detector.head, layer).bias[:] = value  # boxes that would be chosen among them

    trainer.add_callback("on_train_start", break_it)
    with pytest.raises(UserError, match=rf"the {who} predicted NaN or infinite values in epoch 1 on a batch of \S+png"):
        trainer.train()
    assert not trainer.last.exists()


def test_a_term_that_overflows_is_named(data, teacher):
    # As an adaptation does in half precision: both models' predictions are finite
    trainer = GIDTrainer(overrides={"model": "retina_nano", **FAST, "data": str(data), "teacher": str(teacher)})

    def break_it(t):
        torch.nn.init.constant_(t.model.projector.gid.adapt.conv.bias, math.inf)

    trainer.add_callback("on_train_start", break_it)
    with pytest.raises(UserError, match=r"feat_loss, rel_loss became NaN or infinite, .*: lower lr0 or the weight"):
        trainer.train()


def test_a_weight_of_zero_turns_a_term_off(data, teacher):
    trainer = train(data, teacher=str(teacher), gid_relation=0)
    assert "train/rel_loss" not in results(trainer)[0]
    assert results(trainer)[0]["train/feat_loss"] > 0


def test_the_teacher_is_left_alone_by_a_training_epoch(data, teacher):
    trainer = GIDTrainer(overrides={"model": "retina_nano", **FAST, "data": str(data), "teacher": str(teacher)})
    seen = {}

    def remember(t):
        seen["before"] = {k: v.clone() for k, v in t.model.teacher_model.state_dict().items()}
        seen["ids"] = {id(p) for p in t.model.teacher_model.parameters()}

    trainer.add_callback("on_train_start", remember)
    trainer.train()
    after = trainer.model.teacher_model
    assert not after.training
    assert not any(p.requires_grad for p in after.parameters())
    assert all(torch.equal(value, after.state_dict()[key]) for key, value in seen["before"].items())
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not optimised & seen["ids"]
    assert optimised >= {id(p) for p in trainer.model.projector.parameters()}


def test_plain_and_distilled_students_start_from_the_same_weights(data, teacher):
    starts = []
    for extra in ({}, {"teacher": str(teacher)}):
        trainer = GIDTrainer(overrides={"model": "retina_nano", **FAST, "data": str(data), **extra})

        def remember(t):
            inner = getattr(t.model, "student_model", t.model)
            starts.append({k: v.clone() for k, v in inner.state_dict().items()})

        trainer.add_callback("on_train_start", remember)
        trainer.train()
    assert all(torch.equal(starts[0][key], starts[1][key]) for key in starts[0])


def test_an_interrupted_run_resumes_with_its_teacher_and_adaptation(data, teacher):
    trainer = GIDTrainer(
        overrides={"model": "retina_nano", **FAST, "data": str(data), "teacher": str(teacher), "epochs": 3}
    )
    train_one_epoch(trainer)
    saved, ckpt = load_any(trainer.last)
    assert isinstance(saved, TeacherStudentModel)
    assert saved.teacher_model is None  # it would double the file
    assert ckpt["epoch"] == 0

    again = GIDTrainer(overrides={"model": str(trainer.last), "resume": str(trainer.last)})
    seen = {}

    def remember(t):
        seen["adaptation"] = {k: v.clone() for k, v in t.model.projector.state_dict().items()}
        seen["student"] = {k: v.clone() for k, v in t.model.student_model.state_dict().items()}
        seen["teacher"] = t.args.teacher
        seen["epoch"] = t.start_epoch

    again.add_callback("on_train_start", remember)
    again.train()
    assert seen["epoch"] == 1
    assert seen["teacher"] == str(teacher)
    state = ckpt["run_state"]["model"]  # in full precision; the EMA beside it is what would be deployed
    assert len(state) == len(seen["adaptation"]) + len(seen["student"])
    assert all(torch.equal(value, state[f"projector.{key}"]) for key, value in seen["adaptation"].items())
    assert all(torch.equal(value, state[f"student_model.{key}"]) for key, value in seen["student"].items())
    assert [row["epoch"] for row in results(again)] == [1, 2, 3]


def test_a_teacher_that_was_moved_is_named_to_a_resumption(data, teacher, tmp_path, monkeypatch):
    first, said = tmp_path / "teacher.pt", []
    first.write_bytes(teacher.read_bytes())
    arguments = {"model": "retina_nano", **FAST, "data": str(data), "epochs": 2}
    trainer = GIDTrainer(overrides={**arguments, "teacher": str(first)})
    train_one_epoch(trainer)
    moved = first.rename(tmp_path / "moved.pt")
    monkeypatch.setattr("ultralytics.engine.trainer.LOGGER.warning", lambda text, *_: said.append(str(text)))
    resumed = {"model": str(trainer.last), "resume": str(trainer.last)}
    GIDTrainer(overrides={**resumed, "teacher": str(moved), "lr0": 1.0}).train()
    assert [text for text in said if "ignores" in text] == [
        "Resume ignores ['lr0'], using checkpoint values. Start a new run to change them."
    ]


def test_resuming_with_another_teacher_file_is_refused(data, teacher, tmp_path):
    moved = tmp_path / "teacher.pt"
    moved.write_bytes(teacher.read_bytes())
    trainer = GIDTrainer(
        overrides={"model": "retina_nano", **FAST, "data": str(data), "teacher": str(moved), "epochs": 3}
    )
    train_one_epoch(trainer)
    ckpt = torch.load(moved, weights_only=False)
    with torch.no_grad():
        next(ckpt["model"].parameters()).add_(1)
    torch.save(ckpt, moved)
    with pytest.raises(UserError, match="not the teacher this run began with"):
        GIDTrainer(overrides={"model": str(trainer.last), "resume": str(trainer.last)}).train()


def test_the_backbone_has_its_own_learning_rate_and_no_parameter_is_lost(data):
    trainer = GIDTrainer(overrides={"model": "retina_nano", **FAST, "data": str(data), "backbone_lr": 0.25})
    seen = {}

    def remember(t):
        seen["lrs"] = {g["initial_lr"] for g in t.optimizer.param_groups if g["params"]}
        seen["count"] = sum(len(g["params"]) for g in t.optimizer.param_groups)
        seen["all"] = len(list(t.model.parameters()))

    trainer.add_callback("on_train_start", remember)
    trainer.train()
    assert seen["lrs"] == {0.004, 0.25 * 0.004}
    assert seen["count"] == seen["all"]


def test_ema_fits_a_short_run(data):
    trainer = train(data, epochs=2)
    # 8 images in batches of 4 for 2 epochs, two batches a step (nbs = 8), are 2 steps: 1 - 10 / 2 is negative, so the
    # average is the model itself
    assert trainer.ema.decay(1) == 0.0
    trainer.epochs, trainer.train_loader = 200, range(10)
    assert trainer.accumulate == 2  # 200 x 10 / 2 = 1000 steps
    trainer._fit_ema()
    assert trainer.ema.decay(10**6) == pytest.approx(1 - 10 / 1000)


@pytest.mark.parametrize("freeze_bn", [True, False])
def test_frozen_stages_do_not_move(data, freeze_bn):
    trainer = GIDTrainer(
        overrides={"model": "retina_nano", **FAST, "data": str(data), "frozen_stages": 2, "freeze_bn": freeze_bn}
    )
    seen = {}
    trainer.add_callback(
        "on_train_start", lambda t: seen.update({k: v.clone() for k, v in t.model.state_dict().items()})
    )
    trainer.train()
    now = trainer.model.state_dict()
    parts = ("backbone.body.conv_stem", "backbone.body.bn1", "backbone.body.blocks.0")
    frozen = [k for k in now if any(part in k for part in parts)]
    moving = [k for k in now if "backbone.body.blocks.4" in k and k.endswith("conv_pw.weight")]
    assert any("body.bn1.running_mean" in k for k in frozen)
    assert moving
    assert all(torch.equal(now[k], seen[k]) for k in frozen)
    assert not any(torch.equal(now[k], seen[k]) for k in moving)


def test_random_weights_are_not_frozen_by_the_yaml(data, monkeypatch):
    monkeypatch.setattr("gid_yolo.detectors.backbone._reachable", lambda url: False)
    trainer = GIDTrainer(overrides={**FAST, "model": "retina_mbv2", "data": str(data)})  # its yaml freezes
    trainer.setup_model()
    model = trainer.model
    assert model.detector.backbone.source.failed
    assert model.frozen_names == []
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())


def bomb() -> bytes:
    """A PNG of 60000 x 60000 pixels of one colour: 10.8 GB, of 4 bytes that are compressed here."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(4)))]
    chunks = (struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x)) for kind, x in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (b"not an image", "cannot identify image file"),
        (b"", "cannot identify image file"),
        (bomb(), "Image size (3600000000 pixels) exceeds limit"),
    ],
    ids=["text", "empty", "bomb"],
)
def test_an_unreadable_image_is_skipped_by_name(tmp_path, monkeypatch, contents, reason):
    data = write_data(tmp_path / "broken")
    (tmp_path / "broken" / "images" / "train" / "3.png").write_bytes(contents)
    warnings = []
    monkeypatch.setattr(LOGGER, "warning", lambda text, *a, **k: warnings.append(str(text)))
    infos = []
    monkeypatch.setattr(LOGGER, "info", lambda text="", *a, **k: infos.append(str(text)))
    trainer = train(data)
    assert len(trainer.train_loader.dataset) == 7  # 8 written, 1 unreadable
    assert any("3.png" in text for text in warnings + infos)
    assert any("7 of 8: 1 COULD NOT BE USED" in text for text in infos)
    bad = tmp_path / "broken" / "images" / "train" / "3.png"
    (text,) = [text for text in warnings if text.startswith("images left out: 1\n")]
    assert text.splitlines()[1].startswith(f"{bad}: the image cannot be read ({reason}")


def test_labels_that_are_wrong_are_named_by_their_lines(tmp_path, monkeypatch):
    data = write_data(tmp_path / "data")
    labels = tmp_path / "data" / "labels" / "train"
    for name, line in (("1", "5 0.5 0.5 0.2 0.2"), ("2", "0 0.5 0.5 nan 0.2"), ("3", "0 0.5 0.5 -0.2 0.2")):
        file = labels / f"{name}.txt"
        file.write_text(f"{file.read_text()}{line}\n")
    warnings = []
    monkeypatch.setattr(LOGGER, "warning", lambda text, *a, **k: warnings.append(str(text)))
    trainer = train(data)
    assert len(trainer.train_loader.dataset) == 5
    (text,) = [text for text in warnings if "images left out: 3" in text]
    assert sorted(text.splitlines()[1:]) == [
        f"{labels / '1.txt'}:2: class 5 does not exist: the data names 0 to 1",
        f"{labels / '2.txt'}:2: '0 0.5 0.5 nan 0.2' holds NaN or infinite values",
        f"{labels / '3.txt'}:2: -0.2 is negative: coordinates are parts of the image's width and height, 0 to 1",
    ]


def test_a_run_is_repeated_from_its_args(data, teacher):
    first = train(data, teacher=str(teacher), seed=3, gid_top_k=4)
    assert main(["train", f"cfg={first.save_dir / 'args.yaml'}"]) == 0
    runs = sorted(first.save_dir.parent.glob("train*"))
    assert len(runs) == 2
    weights = [load_model(run / "weights" / "best.pt")[0].state_dict() for run in runs]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_the_same_seed_gives_the_same_weights_after_20_steps(data, teacher):
    # 8 images in batches of 4, a step each, with Ultralytics' augmentation
    steps, runs = [], []
    for _ in range(2):
        trainer = GIDTrainer(
            overrides={"model": "retina_nano", **FAST, "data": str(data), "teacher": str(teacher), **TWENTY}
        )
        step = trainer.optimizer_step
        trainer.optimizer_step = lambda step=step: (steps.append(1), step())
        trainer.train()
        runs.append(load_any(trainer.last)[0].state_dict() | load_model(trainer.best)[0].state_dict())
    assert len(steps) == 2 * 20
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


def test_data_without_boxes_is_refused(tmp_path):
    with pytest.raises(UserError, match="no boxes in its train split"):
        train(write_data(tmp_path / "empty", boxes=False))


def test_scores_of_the_shared_classes_alone_are_compared(tmp_path, teacher, log):
    # The teacher knows a and b; the data's class c is learnt from the data alone
    data = write_data(tmp_path / "data", names=("c", "b"))
    trainer = train(data, teacher=str(teacher))
    assert trainer.model.shared.student == [1]
    assert trainer.model.shared.teacher == [1]
    assert "1 of the student's 2 compared with 1 of the teacher's 2 (b = b)" in "\n".join(log)
    assert results(trainer)[0]["train/resp_loss"] > 0

    model, batch = trainer.model.train(), trainer.preprocess_batch(next(iter(trainer.train_loader)))
    before = model.loss(batch)[1]["resp_loss"]
    with torch.no_grad():  # what the teacher thinks of class a, the first of every anchor's two, changes nothing
        model.teacher_model.detector.head.cls_logits.bias[0::2] += 5.0
    torch.testing.assert_close(model.loss(batch)[1]["resp_loss"], before)
    with torch.no_grad():
        model.teacher_model.detector.head.cls_logits.bias[1::2] += 5.0
    assert (model.loss(batch)[1]["resp_loss"] - before).abs() > 1e-3


def test_classes_that_are_not_trained_are_not_distilled(data, teacher):
    trainer = train(data, teacher=str(teacher), classes=[1])
    assert trainer.model.shared.student == [1]
