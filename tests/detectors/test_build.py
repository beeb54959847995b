from pathlib import Path

import pytest
import torch
import yaml

from gid_yolo.cfg import MODELS_DIR, model_names
from gid_yolo.detectors import RetinaNet, build_detector, model_config
from gid_yolo.errors import UserError


@pytest.mark.parametrize("name", model_names())
def test_every_shipped_model_builds(name: str) -> None:
    config = yaml.safe_load((MODELS_DIR / f"{name}.yaml").read_text(encoding="utf-8"))
    detector = build_detector(name, num_classes=2)
    assert detector.num_classes == 2
    assert detector.backbone.name == config["backbone"]
    assert detector.fpn_channels == config["settings"]["fpn_channels"]
    for key in ("box_beta", "center_radius"):
        if key in config["settings"]:
            assert getattr(detector, key) == config["settings"][key]
    parts = detector.backbone.frozen_names
    assert bool(parts) == bool(config["frozen_stages"])
    frozen = [m for m in detector.backbone.body.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert bool(frozen) != config["freeze_bn"]


@pytest.mark.parametrize("name", model_names())
def test_every_shipped_yaml_is_written_in_the_same_style(name: str) -> None:
    text = (MODELS_DIR / f"{name}.yaml").read_text(encoding="utf-8")
    first, *lines = text.splitlines()
    assert first.startswith("# ")  # what it is, in a line
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    for line in lines:
        assert line == line.rstrip()
        assert len(line) <= 120
        assert not line.lstrip().startswith("#")  # a comment stands behind its key
        content, mark, comment = line.partition("#")
        if mark:
            assert content.endswith(" ")
            assert not content.endswith("  ")
            assert comment.startswith(" ")
            assert comment.strip()
    order = ["detector", "backbone", "backbone_weights", "freeze_bn", "frozen_stages", "nc", "settings", "train"]
    keys = list(yaml.safe_load(text))
    assert keys == [key for key in order if key in keys]


def test_names_of_the_pairs_are_there() -> None:
    assert {"retina_nano", "retina_small", "retina_mbv2", "retina_r18", "retina_r50", "retina_r101"} <= set(
        model_names()
    )


@pytest.mark.parametrize("model", ["retina_nano", "retina_nano.yaml", MODELS_DIR / "retina_nano.yaml"])
def test_ways_to_name_a_model(model: str | Path) -> None:
    config = model_config(model)
    assert config["backbone"] == "mobilenetv2_035"
    assert config["yaml_file"] == "retina_nano.yaml"


def test_a_users_yaml_and_a_dict(tmp_path: Path) -> None:
    settings = {"detector": "retinanet", "backbone": "mobilenetv2_035", "nc": 7, "settings": {"fpn_channels": 32}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    for model in (tmp_path / "mine.yaml", str(tmp_path / "mine.yaml"), settings):
        detector = build_detector(model)
        assert isinstance(detector, RetinaNet)
        assert (detector.num_classes, detector.fpn_channels) == (7, 32)
    assert settings == {
        "detector": "retinanet",
        "backbone": "mobilenetv2_035",
        "nc": 7,
        "settings": {"fpn_channels": 32},
    }


def test_overrides_replace_settings_for_this_call_alone() -> None:
    config = model_config("retina_nano")
    detector = build_detector(config, 2, backbone="mobilenetv2_050", fpn_channels=16, freeze_bn=True, frozen_stages=1)
    assert detector.backbone.name == "mobilenetv2_050"
    assert detector.fpn_channels == 16
    assert detector.backbone.frozen_names
    assert config == model_config("retina_nano")
    assert build_detector(config, 2).fpn_channels == config["settings"]["fpn_channels"]


def test_same_seed_same_weights() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build_detector("retina_nano", 2).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("retina_nan", "retina_nano"), ("retina_r51", "retina_r50"), ("retina_nano.yml", "retina_nano")],
)
def test_unknown_model_gets_a_proposal(wrong: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"model={wrong}.*did you mean.*{meant}"):
        build_detector(wrong, 2)


def test_unknown_setting_is_named() -> None:
    with pytest.raises(UserError, match="fpn_chanels"):
        build_detector("retina_nano", 2, fpn_chanels=32)


@pytest.mark.parametrize("classes", [0, -1, 2.0, "3"])
def test_number_of_classes_is_checked(classes: object) -> None:
    with pytest.raises(UserError, match="num_classes"):
        build_detector("retina_nano", classes)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("backbone: resnet18\n", "detector"),
        ("detector: retinanet\n", "backbone"),
        ("detector: yolo\nbackbone: resnet18\n", "yolo"),
        ("- 1\n- 2\n", "key: value"),
        ("a: [1\n", "not a yaml file"),
    ],
)
def test_broken_yaml_is_named(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=problem) as error:
        build_detector(path, 2)
    assert "broken.yaml" in str(error.value)


def test_bad_value_of_a_setting_is_a_user_error() -> None:
    with pytest.raises(UserError, match="p6_from=p4"):
        build_detector("retina_nano", 2, p6_from="p4")
