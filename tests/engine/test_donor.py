"""A detector that begins with the backbone of another kind of detector."""

import pytest
import timm
import torch
from engine_helpers import FAST, train_one_epoch

from gid_yolo.cfg import load_yaml
from gid_yolo.cli import main
from gid_yolo.engine.checkpoint import load_model
from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.engine.donor import donor_of
from gid_yolo.engine.trainer import GIDTrainer


def begun(file: str, data, model: str = "fcos_nano", **more) -> GIDTrainer:
    arguments = {**FAST, "model": model, "data": str(data), "backbone_weights": file, **more}
    trainer = GIDTrainer(overrides=arguments)
    trainer.setup_model()
    return trainer


@pytest.mark.parametrize(("model", "frozen"), [("fcos_nano", False), ("frcnn_nano", False), ("fcos_nano", True)])
def test_the_backbone_is_the_donors(data, teachers, model: str, frozen: bool) -> None:
    model = begun(teachers["retina_nano"], data, model, freeze_bn=frozen).model
    donor = load_model(teachers["retina_nano"])[0].detector.backbone.body.state_dict()
    own = model.detector.backbone.body.state_dict()
    assert own.keys() - donor.keys() == set()
    assert all(torch.equal(value, donor[key].float()) for key, value in own.items())
    assert model.detector.backbone.source.loaded
    assert model.detector.backbone.source.text == f"best.pt ({len(own)} tensors of its backbone)"


def test_the_rest_is_drawn_as_without_a_donor(data, teachers) -> None:
    given = begun(teachers["retina_nano"], data).model.state_dict()
    drawn = begun(False, data).model.state_dict()
    rest = [key for key in drawn if "backbone.body" not in key]
    assert rest
    assert all(torch.equal(given[key], drawn[key]) for key in rest)


def test_a_run_says_where_its_backbone_is_from(data, teachers, tmp_path) -> None:
    arguments = {**FAST, "model": "fcos_nano", "data": str(data), "save_dir": str(tmp_path / "run")}
    trainer = GIDTrainer(overrides={**arguments, "backbone_weights": teachers["retina_nano"]})
    trainer.train()
    model, _ = load_model(trainer.best)
    assert model.record["initialised_from"].startswith("backbone best.pt (")


@pytest.mark.parametrize("of_before", [False, True])
def test_a_run_with_fixed_stages_is_resumed_and_repeated(data, teachers, tmp_path, of_before: bool) -> None:
    # As the large models' are: a fixed batch norm of a frozen stage has no parameters
    fixed = {"backbone_weights": teachers["retina_nano"], "freeze_bn": True, "frozen_stages": 1, "freeze": ["0.neck"]}
    arguments = {**FAST, "model": "fcos_nano", "data": str(data), "epochs": 2, **fixed}
    whole = GIDTrainer(overrides={**arguments, "save_dir": str(tmp_path / "whole")})
    whole.train()
    assert any(name.endswith("bn1.") for name in whole.freeze_layer_names)
    broken = GIDTrainer(overrides={**arguments, "save_dir": str(tmp_path / "broken")})
    train_one_epoch(broken)
    if of_before:  # checkpoints that say what the settings froze beside what was asked for
        contents = torch.load(broken.last, weights_only=False)
        contents["train_args"]["freeze"] = ["0.backbone.body.blocks.0", "0.backbone.body.bn1", "0.neck"]
        torch.save(contents, broken.last)
    assert main(["train", "resume=True", f"model={broken.last}"]) == 0
    assert main(["train", f"cfg={broken.save_dir / 'args.yaml'}", f"save_dir={tmp_path / 'again'}"]) == 0
    if not of_before:
        assert [load_yaml(tmp_path / x / "args.yaml")["freeze"] for x in ("whole", "broken")] == [["0.neck"]] * 2
    runs = [load_model(tmp_path / x / "weights" / "best.pt")[0] for x in ("whole", "broken", "again")]
    first, *others = (run.state_dict() for run in runs)
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)


def refused(capsys, *words: str) -> str:
    assert main(["train", *words]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_another_network_is_refused(capsys, data, teachers) -> None:
    words = [f"{key}={value}" for key, value in FAST.items()]
    given = ["model=retina_nano", "backbone=resnet18", f"backbone_weights={teachers['fcos_nano']}", f"data={data}"]
    text = refused(capsys, *given, *words)
    assert "holds a detector on mobilenetv2_035, and the model is on resnet18: give one on resnet18, or set " in text


def test_a_yolo_has_no_backbone_to_give(capsys, data, teachers) -> None:
    words = [f"{key}={value}" for key, value in FAST.items()]
    text = refused(capsys, "model=retina_nano", f"backbone_weights={teachers['yolo11n.yaml']}", f"data={data}", *words)
    assert "holds a YOLO, which has no timm backbone" in text


def test_another_normalisation_is_refused(data, teachers) -> None:
    donor = donor_of(teachers["retina_nano"])
    assert donor is not None
    own = GIDDetectionModel("retina_nano", nc=2, verbose=False).detector.backbone
    donor.std.mul_(2)
    with pytest.raises(ValueError, match=r"and \[0\.458, 0\.448, 0\.45\], and the model's by .* \[0\.229, 0\.224"):
        own.take(donor, "a.pt")


def test_files_of_tensors_are_no_donors(tmp_path) -> None:
    path = tmp_path / "a.pt"
    torch.save(timm.create_model("mobilenetv2_035", pretrained=False).state_dict(), path)
    for weights in (True, False, None, str(path), str(tmp_path / "missing.pt"), "a.safetensors"):
        assert donor_of(weights) is None
    path.write_bytes(b"cut off")
    assert donor_of(path) is None
