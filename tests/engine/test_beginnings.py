"""What a run begins with, where it is written, and what of it is trained."""

import hashlib
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from engine_helpers import FAST, write_data
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import LOGGER

from gid_yolo.cli import main
from gid_yolo.engine.checkpoint import load_model
from gid_yolo.engine.config import DEFAULTS, yolo_defaults
from gid_yolo.engine.distillation import check_named_teacher
from gid_yolo.engine.fade import factor_of
from gid_yolo.engine.idle import idle
from gid_yolo.engine.place import Start, check_place
from gid_yolo.engine.schedule import check_shares
from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.engine.yolo_trainer import YOLOTrainer
from gid_yolo.errors import UserError


@pytest.fixture
def told(monkeypatch) -> list[str]:
    """What is logged."""
    said: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(LOGGER, level, lambda text="", *args, **kwargs: said.append(str(text)))
    return said


def settings(data: Path, folder: Path, **more) -> dict:
    return {**FAST, "data": str(data), "save_dir": str(folder), "val": False, "iterations": 1, **more}


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_writes_over_no_other_unless_it_is_told_to(data, tmp_path) -> None:
    given = settings(data, tmp_path / "run", model="retina_nano")
    GIDTrainer(overrides=given).train()
    before = digests(tmp_path)
    with pytest.raises(UserError, match=r"holds a run already: .* exist_ok=True to replace it\.$"):  # it is finished
        GIDTrainer(overrides=given)
    assert digests(tmp_path) == before
    (tmp_path / "run" / "coco_metrics.json").unlink()  # as of a run that was stopped
    with pytest.raises(UserError, match=r"holds a run already: .* or go on with it by resume=True model=.*last\.pt"):
        GIDTrainer(overrides=given)
    GIDTrainer(overrides={**given, "exist_ok": True, "seed": 3}).train()
    assert digests(tmp_path)["best.pt"] != before["best.pt"]


def test_a_run_that_begins_takes_the_results_of_the_one_before_away(tmp_path) -> None:
    for name in ("coco_metrics.json", "coco_matches.npz", "args.yaml"):
        (tmp_path / name).write_text("before")
    start = Start(tmp_path)
    (tmp_path / "coco_matches.npz").unlink()
    start.undo()  # refused: all is as it was
    assert len(digests(tmp_path)) == 3
    Start(tmp_path).begin(None)
    assert list(digests(tmp_path)) == ["args.yaml"]


def test_a_start_that_is_refused_leaves_no_folder(data, tmp_path, teacher) -> None:
    given = settings(data, tmp_path / "run", model="retina_nano")
    elsewhere = write_data(tmp_path / "elsewhere")
    for file in (elsewhere.parent / "labels" / "train").glob("*.txt"):
        file.write_text("")
    for more in ({"data": str(elsewhere)}, {"teacher": str(teacher), "teacher_min_ap": 101}):
        with pytest.raises(UserError, match=r"has no boxes in its train split|it has nothing to teach"):
            GIDTrainer(overrides={**given, **more}).train()
        assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()  # by whoever named it
    there = (tmp_path / "run").stat().st_ino
    with pytest.raises(UserError, match="it has nothing to teach"):
        GIDTrainer(overrides={**given, "teacher": str(teacher), "teacher_min_ap": 101}).train()
    assert list(tmp_path.glob("run/*")) == []
    assert (tmp_path / "run").stat().st_ino == there
    GIDTrainer(overrides=given).train()
    before = digests(tmp_path / "run")
    with pytest.raises(UserError, match="it has nothing to teach"):
        GIDTrainer(overrides={**given, "exist_ok": True, "teacher": str(teacher), "teacher_min_ap": 101}).train()
    assert digests(tmp_path / "run") == before


def test_a_start_removes_nothing_that_another_run_made_meanwhile(data, tmp_path, monkeypatch) -> None:
    given = {**settings(data, tmp_path / "run", model="retina_nano"), "project": str(tmp_path), "name": "run"}
    del given["save_dir"]
    read = GIDTrainer.get_dataset

    def late(self):  # the other took the name between this start's look and its own folder
        raise UserError("no data")

    class Taken(GIDTrainer):
        def check_resume(self, overrides):
            super().check_resume(overrides)
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "args.yaml").write_text("theirs")

    monkeypatch.setattr(Taken, "get_dataset", late)
    with pytest.raises(UserError, match="no data"):
        Taken(overrides=given)
    assert (tmp_path / "run" / "args.yaml").read_text() == "theirs"
    monkeypatch.setattr(Taken, "get_dataset", read)
    shutil.rmtree(tmp_path / "run")
    assert Taken(overrides=given).start is None


def test_the_process_that_launches_others_undoes_nothing(data, tmp_path, monkeypatch) -> None:
    trainer = GIDTrainer(overrides=settings(data, tmp_path / "run", model="retina_nano"))
    assert trainer.start is not None

    def launch(self, *args, **kwargs) -> None:
        begin(self, *args, **kwargs)
        self.ddp = True

    begin = DetectionTrainer.__init__
    monkeypatch.setattr(DetectionTrainer, "__init__", launch)
    assert GIDTrainer(overrides=settings(data, tmp_path / "two", model="retina_nano")).start is None


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize(("epoch", "left"), [(0, "no epoch was saved yet"), (1, "gid-train resume=True model={last}")])
def test_a_run_that_is_stopped_by_hand_says_how_to_go_on(
    data, tmp_path, monkeypatch, capsys, epoch, left, over
) -> None:
    if over:  # whose last.pt is not this run's
        GIDTrainer(overrides=settings(data, tmp_path / "run", model="retina_nano")).train()

    def stop(trainer) -> None:
        if trainer.epoch == epoch:
            raise KeyboardInterrupt

    given = settings(data, tmp_path / "run", model="retina_nano", iterations=None, epochs=2, exist_ok=over)
    trainer = GIDTrainer(overrides=given)
    trainer.add_callback("on_train_epoch_start", stop)
    monkeypatch.setattr("gid_yolo.cli.run", lambda *_: trainer.train())
    assert main(["train", "model=retina_nano"]) == 130
    expected = left.format(last=trainer.last)
    assert f"gid train: stopped; {expected}" in capsys.readouterr().err
    assert (tmp_path / "run").exists() == (epoch > 0 or over)
    monkeypatch.setattr("gid_yolo.cli.run", stop_at_once)
    assert main(["val", "model=retina_nano"]) == 130
    assert capsys.readouterr().err == "gid val: stopped.\n"


def stop_at_once(*_) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("key", ["teacher", "model", "pretrained", "backbone_weights"])
def test_a_run_writes_over_nothing_that_it_begins_with(tmp_path, monkeypatch, key) -> None:
    weights = tmp_path / "runs" / "one" / "weights"
    weights.mkdir(parents=True)
    (weights / "best.pt").write_bytes(b"weights")
    place = {"project": str(tmp_path / "runs"), "name": "one", "exist_ok": True, "task": "detect", "mode": "train"}
    monkeypatch.chdir(weights)
    with pytest.raises(UserError, match=rf"{key}=best\.pt lies in the folder .*runs/one, and would be replaced"):
        check_place({**place, key: "best.pt"})
    check_place({**place, "name": "two", key: "best.pt"})
    check_place({**place, "exist_ok": False, key: "best.pt"})  # which gets the folder one-2
    check_place({**place, key: "retina_nano"})  # the name of a model


def frozen(trainer) -> set[str]:
    """Layers of a YOLO without a parameter that is trained, the one that Ultralytics always freezes left out."""
    layers: dict[str, bool] = {}
    for name, parameter in trainer.model.named_parameters():
        layer = name.split(".")[1]
        layers[layer] = layers.get(layer, False) or parameter.requires_grad
    return {layer for layer, trained in layers.items() if not trained}


@pytest.mark.parametrize(
    ("freeze", "layers"),
    [
        (2, {"0", "1"}),
        ([0, 3], {"0", "3"}),
        ("0.conv", set()),
        ("[1]", {"1"}),
        ("2", {"2"}),
        ([11], set()),
        (None, set()),
    ],
)
def test_what_of_a_yolo_is_frozen(data, tmp_path, told, freeze, layers) -> None:
    trainer = YOLOTrainer(overrides=settings(data, tmp_path / "run", model="yolo11n.yaml", freeze=freeze))
    trainer.train()
    assert frozen(trainer) == layers
    parameters = dict(trainer.model.named_parameters())
    assert parameters["model.0.conv.weight"].requires_grad == (freeze not in (2, [0, 3], "0.conv"))
    count = sum(p.numel() for p in parameters.values() if not p.requires_grad)
    assert any(f"; {count / 1e6:.2f} M of the student's are frozen" in line for line in told)


@pytest.mark.parametrize(
    ("freeze", "says"),
    [
        ("model.0", r"freeze=model\.0: there is no part 'model\.0'; e\.g\. freeze=10"),
        ("0.backbone", r"there is no part '0\.backbone'"),
        (True, "there is no part 'True'"),
        (100, "freeze=100 names layer 24, but the model has 0 to 23"),
        ([3, 99], "names layer 99"),
        ([-1], "names layer -1"),
        (24, "freeze=24 leaves nothing to train"),
    ],
)
def test_what_a_yolo_does_not_have_is_not_frozen(data, tmp_path, freeze, says) -> None:
    with pytest.raises(UserError, match=says):
        YOLOTrainer(overrides=settings(data, tmp_path / "run", model="yolo11n.yaml", freeze=freeze)).train()


@pytest.mark.parametrize("key", ["box", "cls", "dfl", "cls_pw"])
def test_our_detectors_have_no_weights_of_yolos_losses(data, tmp_path, key) -> None:
    given = settings(data, tmp_path / "run", model="retina_nano")
    with pytest.raises(UserError, match=f"{key}= weighs a loss of YOLO's, which the detectors of gid-yolo do not have"):
        GIDTrainer(overrides={**given, key: 0.25})
    GIDTrainer(overrides={**given, key: DEFAULTS[key]})  # as an args.yaml says it


@pytest.mark.parametrize("case", ["all of it", "of another backbone", "of another model"])
def test_how_much_comes_from_a_checkpoint_is_said(data, teacher, tmp_path, told, case) -> None:
    given = {"model": str(teacher)}
    if case == "of another backbone":
        given["backbone"] = "resnet10t"
    elif case == "of another model":
        given = {"model": "retina_small", "pretrained": str(teacher)}
    with pytest.raises(UserError, match="backbone_weights=False would be replaced by the weights of the checkpoint"):
        GIDTrainer(overrides=settings(data, tmp_path / "a", **given, backbone_weights=False)).train()
    trainer = GIDTrainer(overrides=settings(data, tmp_path / "b", **given))
    trainer.train()
    held, total = map(int, re.search(r"Transferred (\d+)/(\d+) items", "\n".join(told)).groups())
    assert (held < total) == (case != "all of it")
    part = f"{held} of {total} tensors " if held < total else ""
    assert load_model(trainer.last)[0].record["initialised_from"] == f"{part}from the checkpoint {teacher}"
    assert any(f"ONLY {held} OF {total} TENSORS" in line for line in told) == (held < total / 2)


def test_a_run_that_passes_its_estimated_length_keeps_its_teacher() -> None:
    def weight(iteration: int, **args) -> float:
        run = SimpleNamespace(schedule=SimpleNamespace(iterations=8), own=lambda key: args.get(key))
        return factor_of(run, iteration)

    assert [weight(i) for i in (0, 7, 8, 30)] == [1, 1, 1, 1]
    assert weight(30, distill_until=0.5) == 0
    assert (
        weight(8, distill_decay="linear") == weight(7, distill_decay="linear") == pytest.approx(1 / 16)
    )  # 1 - 7.5 / 8


@pytest.mark.parametrize("share", [{"distill_until": 0.5}, {"distill_decay": "linear"}, {"distill_warmup": 0.1}])
def test_a_share_of_an_unknown_length_is_refused(share) -> None:
    key, value = next(iter(share.items()))
    with pytest.raises(UserError, match=f"time=1 leaves the run's length open, of which {key}={value} is a share"):
        check_shares({"time": 1, **share})
    check_shares({"time": 1, "distill_until": 1, "distill_decay": "constant", "distill_warmup": 0})
    check_shares(share)


@pytest.mark.parametrize(
    ("args", "reasons"),
    [
        ({"gid_top_k": 3, "epochs": 3}, {"gid_top_k": "without a teacher"}),
        ({"distill_until": 0.3, "model": "a"}, {"distill_until": "without a teacher"}),
        ({"teacher_sample": 7, "distill": "fitnet"}, dict.fromkeys(("teacher_sample", "distill"), "without a teacher")),
        ({"distill": "none"}, {}),
        ({"teacher": "t.pt", "distill": "none", "gid_top_k": 3}, {"gid_top_k": "under distill=none"}),
        ({"teacher": "t.pt", "distill": "fitnet", "gid_top_k": 3}, {"gid_top_k": "without distill=gid"}),
        ({"teacher": "t.pt", "distill": "fitnet", "fitnet_weight": 3}, {}),
        ({"teacher": "t.pt", "fine_grained_weight": 3}, {"fine_grained_weight": "without distill=fine_grained"}),
        ({"teacher": "t.pt", "gid_reduction": "sum", "gid_relation": 0}, {"gid_reduction": "without gid_relation"}),
        ({"teacher": "t.pt", "gid_beta": 2, "gid_response": 0}, {"gid_beta": "without gid_response and gid_cross"}),
        ({"teacher": "t.pt", "gid_beta": 2, "gid_response": 0, "gid_cross": 1}, {}),
        ({"teacher": "t.pt", "gid_types": "gt", "gid_iou": 0.1}, {"gid_iou": "under gid_types=gt"}),
        ({"teacher": "t.pt", "gid_top_k": 3, "distill_until": 0.3, "teacher_sample": 7, "gid_roi_size": 5}, {}),
        ({"gid_top_k": 10, "epochs": 3}, {}),  # the default asks for nothing
    ],
)  # fmt: skip
def test_arguments_that_do_nothing_are_said(args, reasons) -> None:
    assert idle(args, {**DEFAULTS, **args}, DEFAULTS) == reasons
    assert idle(yolo_defaults(), yolo_defaults(), yolo_defaults()) == {}


@pytest.mark.parametrize(
    ("student", "args", "says"),
    [
        ("fcos", {}, "the teacher is a retinanet and the student a fcos: their responses cannot be compared"),
        ("yolo", {"distill": "gid+fitnet"}, "the teacher is a retinanet and the student a yolo: their responses"),
        ("fcos", {"distill": "fine_grained"}, "anchors, which a fcos does not have"),
        ("faster_rcnn", {"distill": "fine_grained"}, "needs the same anchors, but the teacher is a retinanet and"),
        (
            "retinanet",
            {"distill": "mimicking"},
            "of proposals, but the student is a retinanet and the teacher",
        ),
    ],
)
def test_a_pair_that_cannot_be_is_refused_before_its_teacher_is_trained(student, args, says) -> None:
    given = {**DEFAULTS, "teacher": "retina_small", **args}
    with pytest.raises(UserError, match=says):
        check_named_teacher(given, student)
    check_named_teacher({**given, "distill": "fitnet"}, student)  # compares whole maps, of any two
    check_named_teacher({**given, "distill": "gid", "gid_response": 0}, student)
    check_named_teacher({**given, "teacher": "some.pt"}, student)  # which is looked at when it is there


def test_it_is_said_and_refused_by_the_commands(data, tmp_path, capsys, told, monkeypatch) -> None:
    monkeypatch.setattr("gid_yolo.engine.teacher.train_teacher", lambda *_: pytest.fail("a teacher is trained"))
    words = [f"{key}={value}" for key, value in settings(data, tmp_path / "run").items()]
    assert main(["train", "model=retina_nano", "teacher=fcos_nano", *words]) == 2
    assert "their responses cannot be compared one to one" in capsys.readouterr().err
    assert main(["train", "model=retina_nano", "gid_top_k=3", *words]) == 0
    assert any(line.startswith("gid_top_k=3 (without a teacher), ") and line.endswith("do nothing.") for line in told)
