"""Yamls of models and of data that nobody thought of: a sentence, or a network that trains; never another error."""

import contextlib

import pytest
import torch
import yaml
from engine_helpers import FAST, write_data
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from gid_yolo.cfg import MODELS_DIR
from gid_yolo.detectors.build import build_detector
from gid_yolo.detectors.settings import BOOLS, LISTS, NUMBERS, WHOLE, check_settings
from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.errors import UserError
from gid_yolo.export.evaluate import open_split, read_data

COMMON = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
NAMES = ("retina_nano", "fcos_nano", "frcnn_nano")
YAMLS = {name: yaml.safe_load((MODELS_DIR / f"{name}.yaml").read_text()) for name in NAMES}
SETTINGS = sorted({*BOOLS, *WHOLE, *NUMBERS, *LISTS, "anchor_sizes", "head_norm", "p6_from", "zzz"})
NUMBER = st.one_of(
    st.sampled_from([0, 1, -1, 2, 3, 16, 10**6, 10**12, 0.0, 0.5, 1.0, 1.5, -0.5, 1e308, float("nan"), float("inf")]),
    st.integers(),
    st.floats(),
)
PLAIN = st.one_of(NUMBER, st.none(), st.booleans(), st.sampled_from(["", "gn", "pool", "none", "../x", "resnet18"]))
VALUES = st.one_of(PLAIN, st.lists(PLAIN, max_size=5), st.lists(st.lists(NUMBER, max_size=2), min_size=3, max_size=5))
PLACES = st.one_of(
    st.sampled_from(NAMES).flatmap(
        lambda name: st.tuples(st.just(name), st.just("settings"), st.sampled_from(SETTINGS))
    ),
    st.tuples(st.sampled_from(NAMES), st.just(""), st.sampled_from([*YAMLS["retina_nano"], "mean", "std", "zzz"])),
)


# A network of these sizes is right, and takes a minute and gigabytes to build: more than can be tried here
HUGE = {"fpn_channels": 128, "head_width": 128, "roi_size": 8, "num_convs": 8, "head_convs": 8, "rpn_convs": 8}


def changed(name: str, part: str, key: str, value) -> dict:
    """A shipped yaml's settings with one value put in."""
    config = {**YAMLS[name], "settings": dict(YAMLS[name]["settings"])}
    (config[part] if part else config)[key] = value
    return config


@settings(max_examples=150, **COMMON)
@given(place=PLACES, value=VALUES)
def test_a_model_is_refused_or_trains(place, value):
    limit = HUGE.get(place[2])
    assume(limit is None or not isinstance(value, (int, float)) or not limit < value <= WHOLE[place[2]][1])
    with contextlib.suppress(UserError):
        network = GIDDetectionModel(changed(*place, value), nc=2)
        network.args = {"nbs": 64}
        box = torch.tensor([[0.5, 0.5, 0.4, 0.4]])
        batch = {"img": torch.rand(2, 3, 64, 64), "batch_idx": torch.zeros(1), "cls": torch.zeros(1, 1), "bboxes": box}
        network.train()(batch)[0].sum().backward()
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, 64, 64))


@settings(max_examples=150, **COMMON)
@given(key=st.sampled_from([*YAMLS["retina_nano"]["train"], "zzz"]), value=VALUES)
def test_a_training_section_is_refused_or_taken(tmp_path_factory, data, key, value):
    folder = tmp_path_factory.mktemp("train")
    (folder / "m.yaml").write_text(
        yaml.safe_dump({**YAMLS["retina_nano"], "train": {**YAMLS["retina_nano"]["train"], key: value}})
    )
    with contextlib.suppress(UserError):
        GIDTrainer(overrides={"model": str(folder / "m.yaml"), "data": str(data), "save_dir": str(folder / "run")})


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("small") / "data")


SPLITS = st.one_of(
    VALUES, st.sampled_from(["images/train", "images/none", "images", ".", "..", "/none", ["images/val"]])
)
DATA = st.one_of(
    st.tuples(st.sampled_from(["train", "val", "test", "path"]), SPLITS),
    st.tuples(st.sampled_from(["names", "nc", "channels", "kpt_shape", "download", "yaml_file", "zzz"]), VALUES),
    st.tuples(st.just("names"), st.lists(st.text(max_size=4), max_size=3)),
)


@settings(max_examples=200, **COMMON)
@given(change=DATA, absent=st.sampled_from([None, None, "train", "val", "names"]))
def test_data_is_refused_or_read(small, tmp_path_factory, change, absent):
    contents = {**yaml.safe_load(small.read_text()), "path": str(small.parent), change[0]: change[1]}
    contents.pop(absent, None)
    file = small.parent / "fuzz.yaml"
    file.write_text(yaml.safe_dump(contents))
    with contextlib.suppress(UserError):
        path, read = read_data(file, "val")
        assert len(open_split(path, read, split="val", imgsz=[64, 64], batch=2).dataset) > 0
    with contextlib.suppress(UserError):
        own = {"model": "retina_nano", "data": str(file), "save_dir": str(tmp_path_factory.mktemp("run"))}
        trainer = GIDTrainer(overrides={**FAST, **own})
        trainer.model = GIDDetectionModel("retina_nano", nc=trainer.data["nc"])  # which loaders ask for its stride
        assert len(trainer.get_dataloader(trainer.data["train"], 4, mode="train")) > 0


@pytest.mark.parametrize("name", sorted({path.stem for path in MODELS_DIR.glob("*.yaml")}))
def test_every_shipped_yaml_is_taken(name):
    config = yaml.safe_load((MODELS_DIR / f"{name}.yaml").read_text())
    check_settings(config["settings"])


@pytest.mark.parametrize(
    ("model", "key", "value", "says"),
    [
        ("retina_nano", "positive_iou", 1.5, "positive_iou=1.5 must be a number from 0 to 1"),
        ("retina_nano", "positive_iou", 0.3, "negative_iou=0.4 must not be above positive_iou=0.3"),
        ("retina_nano", "num_convs", 2.0, "num_convs=2.0 must be a whole number from 0 to 100"),
        ("retina_nano", "whole_anchors", 1, "whole_anchors=1 must be True or False"),
        ("retina_nano", "aspect_ratios", [], "aspect_ratios=[] must be a list of numbers"),
        ("retina_nano", "aspect_ratios", [0.5, "a"], "of which every=a must be a number from 0.001 to 1000"),
        ("retina_nano", "anchor_sizes", [[0.4]] * 5, "have no area"),
        ("fcos_nano", "center_radius", -1, "center_radius=-1 must be a number of at least 0"),
        ("frcnn_nano", "box_weights", [1, 1], "box_weights=[1, 1] must be a list of 4 numbers"),
    ],
)
def test_a_setting_that_cannot_work_is_named(model, key, value, says):
    with pytest.raises(UserError) as caught:
        build_detector(changed(model, "settings", key, value))
    assert says in str(caught.value)
