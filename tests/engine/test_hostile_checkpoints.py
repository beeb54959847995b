"""Malicious and damaged files in the place of checkpoints: nothing in them runs, and each gets one clear sentence."""

import os
import subprocess
import sys
from pathlib import Path

import hostile_pickles
import pytest
import torch
from hostile_files import BOMBS, EVAL, FILES, SENTINEL, good, saved

from gid_yolo.cli import main
from gid_yolo.engine.checkpoint import load_model
from gid_yolo.errors import UserError

FAST = ["epochs=1", "imgsz=64", "batch=4", "plots=False", "teacher_min_ap=0"]


def refused(capsys, *words: str) -> str:
    """What the command line says of `words`, which is one sentence on one line, and writes nothing."""
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    assert main(list(words)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gid ")]
    assert len(lines) == 1
    sentence = lines[0].partition(": ")[2]
    assert sentence.endswith(".")
    assert "Traceback" not in sentence
    assert len(sentence) < 500
    assert sorted(Path().rglob("*")) == before  # no payload has run, no run has begun
    return sentence


def commands(path: Path, data: Path) -> dict[str, list[str]]:
    """The three ways in."""
    return {
        "model": ["val", f"model={path}", f"data={data}"],
        "teacher": ["train", "model=retina_nano", f"teacher={path}", f"data={data}", *FAST],
        "resume": ["train", f"resume={path}"],
    }


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_refused_in_one_sentence(capsys, tmp_path, data, name: str) -> None:
    path = tmp_path / "file.pt"
    FILES[name](path)
    assert not (tmp_path / SENTINEL).exists()
    for role, words in commands(path, data).items():
        text = refused(capsys, *words)
        assert text.startswith(f"{'teacher' if role == 'teacher' else 'model'}={path} ")


def test_there_are_files_enough() -> None:
    assert hostile_pickles.BEFORE >= 100
    assert len(FILES) >= hostile_pickles.BEFORE + 30


def test_networks_that_are_what_their_classes_are(tmp_path) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(saved(hostile_pickles.yolo()))
    assert load_model(path)[0].names == {0: "a", 1: "b"}
    path.write_bytes(saved(hostile_pickles.yolo(lambda model, layer: model.eval().fuse(verbose=False))))
    assert load_model(path)[0].is_fused()


@pytest.mark.parametrize(
    "name", ["os.system alone", "eval as the model", "a payload behind the model", "a payload in protocol 4"]
)
def test_the_payloads_would_run_in_a_plain_reader(tmp_path, name: str) -> None:
    FILES[name](tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / SENTINEL).exists()


def test_what_is_named_first_is_said_and_that_trust_opens_it(capsys, tmp_path, data) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(saved(good(model=EVAL)))
    text = refused(capsys, "val", f"model={path}", f"data={data}")
    assert "holds builtins.eval, so that opening it could run code: trust=True opens it all the same" in text
    with pytest.raises(UserError, match="not a checkpoint"):
        load_model(path, trust=True)
    assert (tmp_path / SENTINEL).exists()  # it was trusted


_CHILD = """
import resource, sys
from pathlib import Path
import hostile_pickles
from hostile_files import BOMBS, FILES
from gid_yolo.engine.checkpoint import load_model
from gid_yolo.errors import UserError
path, before = Path(sys.argv[1]), None
for name in sorted(BOMBS):
    FILES[name](path)
    before = before or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        load_model(path)
        print("opened", name)
    except UserError:
        pass
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    if grown > 700:
        print(name, grown, "MB")
        break
print("done")
"""


def test_bombs_do_not_fill_the_memory(tmp_path) -> None:
    pytest.importorskip("resource")
    command = [sys.executable, "-c", _CHILD, str(tmp_path / "file.pt")]
    tests = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env={**os.environ, "PYTHONPATH": tests},
    )
    assert len(BOMBS) > 15
    assert done.stdout.split("\n")[-2:] == ["done", ""]
    assert done.stdout.strip() == "done"
