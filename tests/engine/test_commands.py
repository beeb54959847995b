"""What a command cannot do with what it is given: a sentence, where it had a traceback or lost a word silently."""

import inspect
import re
import shutil

import pytest
from test_bad_input import sentence

from gid_yolo import GID
from gid_yolo.analysis.visualize import visualize
from gid_yolo.cli import HELP, MODES, main
from gid_yolo.engine.config import OWN_KEYS
from gid_yolo.engine.modes import check_use
from gid_yolo.errors import UserError
from gid_yolo.export.benchmark import benchmark


@pytest.fixture(scope="module")
def onnx_file(teacher, tmp_path_factory) -> str:
    copy = tmp_path_factory.mktemp("onnx") / "t.pt"
    shutil.copy(teacher, copy)
    return GID(copy).export(imgsz=64)


@pytest.mark.parametrize("mode", ["train", "export"])
def test_an_onnx_file_is_not_trained_or_exported(capsys, onnx_file, data, mode):
    text = sentence(capsys, mode, f"model={onnx_file}", f"data={data}")
    assert f"model={onnx_file} is an ONNX file, which gid-val and gid-predict take: give the checkpoint" in text


@pytest.mark.parametrize(
    "source", ["97", "rtsp://127.0.0.1:9/live", "http://127.0.0.1:9/live", "http://127.0.0.1:9/a.png"]
)
def test_a_source_that_does_not_answer(capsys, teacher, source):
    words = (f"model={teacher}", f"source={source}", "imgsz=64")
    assert f"source={source} cannot be read: " in sentence(capsys, "predict", *words)


def test_a_place_that_predictions_cannot_be_saved_to_is_not_the_sources_fault(capsys, teacher, data):
    words = (f"model={teacher}", f"source={data.parent / 'images' / 'val'}", "imgsz=64", "project=/proc/none")
    text = sentence(capsys, "predict", *words)
    assert "/proc/none cannot be used (No such file or directory): give another place" in text


@pytest.mark.parametrize("word", ["self=1", "stream=True", "predictor=x", "validator=x", "trainer=x"])
@pytest.mark.parametrize("mode", MODES)
def test_parameters_of_python_are_no_words(capsys, teacher, mode, word):
    words = ["verdict"] if mode == "study" else [f"model={teacher}", "source=x.png", "teacher=x.pt"]
    assert f"{word.split('=')[0]}= is not an argument of a command" in sentence(capsys, mode, *words, word)


def test_python_streams_results(teacher, data):
    results = GID(teacher).predict(str(data.parent / "images" / "val"), stream=True, imgsz=64, verbose=False)
    assert inspect.isgenerator(results)
    assert len(list(results)) == 4


@pytest.mark.parametrize(
    ("mode", "word", "says"),
    [
        ("val", "plots=maybe", "'plots' must be a bool (i.e. 'plots=True' or 'plots=False')"),
        ("predict", "save=5", "'save' must be a bool"),
        ("predict", "source=[1]", "source=[1] cannot be read: type int is not a supported"),
        ("visualize", "exist_ok=no", "'exist_ok' must be a bool"),
        ("benchmark", "data=5", "data=5 must be a text"),
        ("benchmark", "baseline=5", "baseline=5 must be a text"),
        ("benchmark", "teacher=5", "teacher=5 must be a text"),
        ("benchmark", "exist_ok=no", "exist_ok=no must be True or False"),
        ("visualize", "teacher=5", "teacher=5 must be a text"),
        ("visualize", "source=5", "source=5 must be a text"),
        ("study", "data=5", "data=5 must be a text"),
        ("study", "plan=no", "plan=no must be True or False"),
        ("study", "name=my", "name= is what gid-study sets for each run"),
    ],
)
def test_values_that_another_command_cannot_take(capsys, teacher, mode, word, says):
    given = {"model": teacher} if mode != "study" else {}
    given |= {"teacher": teacher} if mode in {"benchmark", "visualize"} else {}
    given |= {"source": "x.png"} if mode in {"predict", "visualize"} else {}
    words = [f"{key}={value}" for key, value in given.items() if key != word.split("=")[0]]
    assert says in sentence(capsys, mode, *(["verdict"] if mode == "study" else []), *words, word)


def test_one_run_is_resumed(capsys, tmp_path, teacher):
    other = f"model={tmp_path / 'b' / 'last.pt'}"
    assert f"and {other} name two runs to go on with" in sentence(capsys, "train", f"resume={teacher}", other)
    same = teacher.parent / ".." / teacher.parent.name / teacher.name  # by another path
    assert "finished run" in sentence(capsys, "train", f"resume={teacher}", f"model={same}")


USED = {
    "val": set(),
    "predict": set(),
    "export": {"winograd", "file"},
    "visualize": {"teacher", "gid_top_k", "gid_iou"},
}


@pytest.mark.parametrize("mode", USED)
def test_every_own_argument_is_used_or_refused(mode):
    assert USED[mode] < OWN_KEYS
    for key in OWN_KEYS:
        if key in USED[mode] | {"trust"}:
            check_use(mode, {key: 1})
        else:
            with pytest.raises(UserError, match=rf"^{key}=1 does nothing in gid-{mode}: leave it out\.$"):
                check_use(mode, {key: 1})
        check_use(mode, {} if key == "distill" else {key: None})  # Ultralytics' None is a word of distill=


def test_what_the_figures_are_said_to_go_by_is_used():
    named = re.search(r"that bear on it: (.*?)\.\n", inspect.getdoc(visualize), re.DOTALL)
    check_use("visualize", dict.fromkeys(re.split(r",\s+", named[1]), 1))


@pytest.mark.parametrize(
    ("mode", "words", "says"),
    [
        ("val", ["teacher=zzz", "gid_feature=3"], "teacher=zzz, gid_feature=3 do nothing in gid-val: leave them out"),
        ("val", ["distill=none"], "distill=none does nothing in gid-val: leave it out"),
        ("predict", ["backbone=foo"], "backbone=foo does nothing in gid-predict"),
        ("export", ["project=p", "name=n"], "project=p, name=n do nothing in gid-export"),
        ("export", ["split=test"], "split=test does nothing in gid-export"),
        ("export", ["classes=0"], "classes=0 does nothing in gid-export"),
        ("export", ["teacher=zzz"], "teacher=zzz does nothing in gid-export"),
        (
            "export",
            ["data=nowhere.yaml"],
            "data=nowhere.yaml holds the images of quantize=8: leave it out",
        ),
        ("visualize", ["gid_types=pos"], "gid_types=pos does nothing in gid-visualize"),
        ("visualize", ["conf=0.5"], "conf=0.5 does nothing in gid-visualize"),
        ("visualize", ["data=nowhere.yaml"], "data=nowhere.yaml does nothing in gid-visualize"),
    ],
)
def test_what_a_mode_does_not_go_by_is_refused(capsys, teacher, mode, words, says):
    more = {"predict": ["source=x.png"], "visualize": ["source=x.png", f"teacher={teacher}"]}.get(mode, [])
    assert says in sentence(capsys, mode, f"model={teacher}", *more, *words)


def test_help_has_the_benchmarks_arguments_and_their_defaults(capsys):
    assert main(["help"]) == 0
    assert HELP in capsys.readouterr().out
    lines = HELP.partition("gid-benchmark has")[2].partition("Arguments of the others")[0].splitlines()[1:]
    said = dict(word.split("=") for line in lines for word in line.strip().split("  ")[0].split())
    has = {p.name: p.default for p in inspect.signature(benchmark).parameters.values() if p.kind is p.KEYWORD_ONLY}
    elsewhere = {"model", "baseline", "teacher", "data", "trust"}  # in the line of the command, and below it
    assert set(said) == set(has) - elsewhere
    unsaid = {"imgsz", "others", "project", "name"}
    cpu = {"provider": "cpu", "device": "cpu"}  # None is the CPU
    assert {key: said[key] for key in said if key not in unsaid} == {
        key: cpu.get(key, str(value)) for key, value in has.items() if key not in elsewhere | unsaid
    }
    assert {said[key] for key in unsaid} == {"..."}
