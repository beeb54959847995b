"""Arguments and files of arguments that nobody thought of: a sentence, or they are taken; never another error."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gid_yolo.cli import parse
from gid_yolo.engine.config import DEFAULTS, OWN_KEYS, check_keys
from gid_yolo.engine.recipe import read_cfg, read_recipe
from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.engine.values import check_values
from gid_yolo.errors import UserError

FUZZ = settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([0, 1, -1, "", "none", "all"]),
)
VALUES = st.one_of(PLAIN, st.lists(PLAIN, max_size=3), st.dictionaries(st.text(max_size=3), PLAIN, max_size=2))
LINES = st.lists(st.tuples(st.sampled_from([*OWN_KEYS, "lr0", "x"]), st.text(max_size=8)), max_size=4)
# Where things are written, what is opened, and what runs: these have tests of their own
ELSEWHERE = {"save_dir", "project", "name", "exist_ok", "data", "model", "resume", "teacher", "cfg", "recipe", "device"}
FILES = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
    LINES.map(lambda pairs: "\n".join(f"{key}: {value}" for key, value in pairs).encode("utf-8", "surrogatepass")),
)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("files") / "a.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("run")


@FUZZ
@given(words=st.lists(st.one_of(st.text(max_size=12), LINES.map(lambda x: "=".join(x[0]) if x else "=")), max_size=4))
def test_words_of_a_command(words):
    with contextlib.suppress(UserError):
        assert "" not in parse(words)


@FUZZ
@given(
    args=st.dictionaries(
        st.sampled_from([*OWN_KEYS, "imgsz", "conf", "iou", "max_det", "epochs", "batch"]), VALUES, max_size=3
    )
)
def test_values_of_arguments(args):
    with contextlib.suppress(UserError):
        check_values(args)


@FUZZ
@given(args=st.dictionaries(st.sampled_from(sorted(set(DEFAULTS) - ELSEWHERE)), VALUES, min_size=1, max_size=2))
def test_values_that_a_trainer_is_given(data, folder, args):
    with contextlib.suppress(UserError):
        trainer = GIDTrainer(overrides={"model": "retina_nano", "data": str(data), "save_dir": str(folder), **args})
        assert 0 <= trainer.args.seed < 2**32


@FUZZ
@given(args=st.dictionaries(st.one_of(st.text(max_size=8), st.sampled_from(sorted(DEFAULTS))), VALUES, max_size=3))
def test_names_of_arguments(args):
    with contextlib.suppress(UserError):
        check_keys(args)
        assert set(args) <= set(DEFAULTS)


@FUZZ
@given(contents=FILES)
def test_files_of_arguments(path, contents):
    path.write_bytes(contents)
    with contextlib.suppress(UserError):
        assert isinstance(read_cfg(path), dict)
    with contextlib.suppress(UserError):
        assert isinstance(read_recipe(path, "retinanet"), dict)
