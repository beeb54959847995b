"""Every way by which a file of weights comes in reads it as data, and only its user says that it is to be trusted."""

import codecs
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from engine_helpers import FAST, train_one_epoch, write_data
from hostile_files import EVAL, SENTINEL, Calls, good, parts, saved, with_parts
from ultralytics.nn import tasks
from ultralytics.nn.tasks import DetectionModel

from gid_yolo import GID
from gid_yolo.cfg import MODELS_DIR
from gid_yolo.cli import main
from gid_yolo.detectors.build import model_config
from gid_yolo.engine.checkpoint import load_any, load_model
from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.engine.yolo_trainer import YOLOTrainer
from gid_yolo.errors import UserError

WORDS = [f"{key}={value}" for key, value in FAST.items()]
CODE = "holds builtins.eval, so that opening it could run code"


@pytest.fixture
def evil(tmp_path) -> Path:
    path = tmp_path / "evil.pt"
    path.write_bytes(saved(good(zzz=EVAL)))
    return path


def refused(capsys, *words) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gid ")]
    assert len(lines) == 1
    assert not Path(SENTINEL).exists()
    return lines[0]


@pytest.mark.parametrize(
    "words",
    [
        ["val", "model={evil}", "data={data}"],
        ["predict", "model={evil}", "source=x.png"],
        ["export", "model={evil}"],
        ["benchmark", "model={evil}", "data={data}"],
        ["benchmark", "model={teacher}", "baseline={evil}", "data={data}"],
        ["benchmark", "model={teacher}", "teacher={evil}", "data={data}"],
        ["benchmark", "model={teacher}", "others={evil}", "data={data}"],
        ["visualize", "model={teacher}", "teacher={evil}", "source=x.png"],
        ["visualize", "model={evil}", "teacher={teacher}", "source=x.png"],
        ["study", "verdict", "model={evil}", "teacher={teacher}", "data={data}"],
        ["study", "verdict", "model=retina_nano", "teacher={evil}", "data={data}"],
        ["train", "model={evil}", "data={data}", *WORDS],
        ["train", "model=retina_nano", "pretrained={evil}", "data={data}", *WORDS],
        ["train", "model={teacher}", "pretrained={evil}", "data={data}", *WORDS],
        ["train", "model=yolo11n.yaml", "teacher={evil}", "data={data}", *WORDS],
        ["train", "model={evil}", "resume=True"],
    ],
    ids=" ".join,
)
def test_no_way_in_runs_code(capsys, data, teacher, evil, words) -> None:
    assert CODE in refused(capsys, *(word.format(evil=evil, data=data, teacher=teacher) for word in words))
    assert tasks.SAFE_LOAD is False  # Ultralytics' own switch is as it was


def test_a_name_that_finds_a_file(capsys, data, evil) -> None:
    evil.rename("retina_small.pt")
    assert CODE in refused(capsys, "train", "model=retina_nano", "teacher=retina_small", f"data={data}", *WORDS)


def test_the_trainer_itself_refuses_what_it_resumes(evil) -> None:
    with pytest.raises(UserError, match=f"resume={evil} {CODE}"):
        GIDTrainer(overrides={"resume": str(evil)})


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("backbone", ["mobilenetv2_035", "torchvision/mobilenet_v2"])
def test_backbone_weights_are_looked_at(capsys, data, tmp_path, backbone: str, old: bool) -> None:
    path = tmp_path / "backbone.pth"
    for value in (Calls(bytearray, 10**11), Calls(codecs.encode, "aa", "hex"), Calls(torch.nn.LSTM, 2, 2)):
        path.write_bytes(saved({"conv_stem.weight": value}, _use_new_zipfile_serialization=not old))
        words = ["model=frcnn_nano", f"backbone={backbone}", f"backbone_weights={path}", f"data={data}"]
        text = refused(capsys, "train", *words, *WORDS)
        assert "backbone.pth cannot be read (" in text
        assert "Refused" in text or "Foreign" in text


def test_backbone_weights_of_the_older_format(tmp_path) -> None:
    body = timm.create_model("mobilenetv2_035", pretrained=False)
    for old in (False, True):
        torch.save(body.state_dict(), tmp_path / "a.pth", _use_new_zipfile_serialization=not old)
        settings = {**model_config("retina_nano"), "backbone_weights": str(tmp_path / "a.pth")}
        loaded = GIDDetectionModel(settings, nc=2, verbose=False, load_backbone=True).detector.backbone
        assert loaded.source.loaded
        assert torch.equal(loaded.body.conv_stem.weight, body.conv_stem.weight)


@pytest.mark.parametrize("name", ["backbone.pth", "backbone.pt", "backbone.safetensors"])
def test_backbone_weights_are_data(capsys, data, tmp_path, name: str) -> None:
    (tmp_path / name).write_bytes(saved({"conv_stem.weight": EVAL}))
    text = refused(capsys, "train", "model=retina_nano", f"backbone_weights={tmp_path / name}", f"data={data}", *WORDS)
    assert f"{name} cannot be read" in text


def test_a_best_beside_the_last_that_is_not_the_runs_own(data, evil, tmp_path, capsys) -> None:
    trainer = GIDTrainer(overrides={**FAST, "model": "retina_nano", "data": str(data), "epochs": 2})
    train_one_epoch(trainer)
    contents = torch.load(trainer.last, weights_only=True)
    torch.save({**contents, "best_fitness": 1e9}, trainer.last)  # which no later epoch surpasses
    shutil.copy(evil, trainer.best)
    assert CODE in refused(capsys, "train", f"resume={trainer.last}")


@pytest.mark.parametrize("family", ["gid", "yolo"])
def test_a_resumed_state_that_does_not_fit(capsys, data, family: str) -> None:
    kind, model = (GIDTrainer, "retina_nano") if family == "gid" else (YOLOTrainer, "yolo11n.yaml")
    trainer = kind(overrides={**FAST, "model": model, "data": str(data), "epochs": 2})
    train_one_epoch(trainer)
    contents = load_any(trainer.last)[1]
    contents["optimizer"] = {"state": {0: {"exp_avg": "much"}}, "param_groups": [{"lr": "high", "params": [0]}]}
    contents.pop("run_state", None)
    torch.save(contents, trainer.last)
    assert f"resume={trainer.last} cannot go on (" in refused(capsys, "train", f"resume={trainer.last}")


# No file says that it, or another, is to be trusted --------------------------------------------


def test_a_models_settings_cannot_ask_for_trust(capsys, data, evil, tmp_path) -> None:
    (tmp_path / "model.pt").write_bytes(saved(with_parts(settings={"train": {"trust": True, "epochs": 1}})))
    assert CODE in refused(capsys, "train", f"model={tmp_path / 'model.pt'}", f"teacher={evil}", f"data={data}")
    text = (MODELS_DIR / "retina_nano.yaml").read_text().replace("train:", "train:\n  trust: True")
    (tmp_path / "model.yaml").write_text(text)
    assert CODE in refused(capsys, "train", f"model={tmp_path / 'model.yaml'}", f"teacher={evil}", f"data={data}")


def test_files_of_arguments_cannot_ask_for_trust(capsys, data, evil, tmp_path) -> None:
    (tmp_path / "args.yaml").write_text(yaml.safe_dump({"trust": True, "teacher": str(evil), "data": str(data)}))
    assert CODE in refused(capsys, "train", "model=retina_nano", f"cfg={tmp_path / 'args.yaml'}", *WORDS)
    text = refused(capsys, "train", "model=retina_nano", f"recipe={tmp_path / 'args.yaml'}", f"data={data}", *WORDS)
    assert "trust belongs to a single run" in text


def test_a_resumed_run_forgets_trust(capsys, data, teacher, evil) -> None:
    trainer = GIDTrainer(
        overrides={
            **FAST,
            "model": "retina_nano",
            "data": str(data),
            "teacher": str(teacher),
            "epochs": 2,
            "trust": True,
        }
    )
    train_one_epoch(trainer)
    assert trainer.args.trust is True
    assert CODE in refused(capsys, "train", f"resume={trainer.last}", f"teacher={evil}")


def test_trust_is_true_or_false(capsys, teacher) -> None:
    for mode in ("val", "train", "benchmark", "export"):
        assert "trust=maybe must be True or False" in refused(capsys, mode, f"model={teacher}", "trust=maybe")


def test_trust_opens_for_every_mode(data, tmp_path, monkeypatch) -> None:
    path = tmp_path / "evil.pt"
    path.write_bytes(saved(good(zzz=EVAL)))
    sentinel = tmp_path / SENTINEL
    opened = []
    for words in (
        ["val", f"model={path}"],
        ["train", "model=retina_nano", f"teacher={path}", *WORDS, "gid_response=0"],
        ["train", f"model={path}", *WORDS],
    ):
        sentinel.unlink(missing_ok=True)
        assert main([*words, f"data={data}", "imgsz=64", "trust=True"]) == 0
        opened.append(sentinel.exists())
    assert opened == [True] * 3
    sentinel.unlink()
    GID(path, trust=True).train(data=str(data), **FAST)
    assert sentinel.exists()


# What a file says besides its weights --------------------------------------------


def test_a_file_does_not_say_what_is_downloaded(capsys, tmp_path) -> None:
    contents = good(train_args={"imgsz": 64, "data": "https://example.org/x.yaml"}, epoch=1, optimizer={
        "state": {}, "param_groups": []})  # fmt: skip
    (tmp_path / "a.pt").write_bytes(saved(contents))
    assert load_model("a.pt")[0].args["data"] is None
    assert "or would be downloaded" in refused(capsys, "train", f"resume={tmp_path / 'a.pt'}")


@pytest.mark.parametrize(
    "change",
    [
        {"activation": f"[open({SENTINEL!r}, 'w'), __import__('torch').nn.SiLU()][1]"},
        {"backbone": [[-1, 1, "load_checkpoint", ["evil.pt"]]]},
        {"backbone": [[-1, 1, "Conv", [10**6, 30]]]},
        {"backbone": [[-1, 10**9, "nn.Identity", []]]},
        {"backbone": None},
        {"scales": {"n": [1.0, 10**5, 10**9]}},
    ],
    ids=["eval", "a loader", "wide", "long", "none", "scaled"],
)
def test_the_settings_of_a_yolo_are_not_code(capsys, data, evil, tmp_path, change) -> None:
    model = DetectionModel("yolo11n.yaml", nc=2, verbose=False)
    model.names = {0: "a", 1: "b"}
    model.yaml.update(change)
    path = tmp_path / "yolo.pt"
    torch.save({"model": model, "train_args": {}}, path)
    assert load_model(path)[0].names == {0: "a", 1: "b"}  # its layers are there, and need no settings
    text = refused(capsys, "train", f"model={path}", f"data={data}", *WORDS)
    assert f"model={path} has settings that make no network (" in text
    text = refused(capsys, "train", "model=yolo11n.yaml", f"teacher={path}", f"data={data}", *WORDS)
    assert f"teacher={path} has settings that make no network (" in text


@pytest.mark.parametrize(
    "change",
    [
        {"names": ["a"]},
        {"names": {"a": 0}},
        {"yaml": "all"},
        {"stride": 5},
        {"stride": torch.zeros(0)},
        {"model": None},
    ],
)
def test_a_yolo_without_what_it_is_asked_for(capsys, data, tmp_path, change) -> None:
    model = DetectionModel("yolo11n.yaml", nc=2, verbose=False)
    if "model" in change:
        model._modules.pop("model")
    else:
        vars(model).update(change)
    torch.save({"model": model, "train_args": {}}, tmp_path / "yolo.pt")
    assert "is not a checkpoint" in refused(capsys, "val", f"model={tmp_path / 'yolo.pt'}", f"data={data}")


# Files of other kinds --------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.pth", saved({"model": {"w": Calls(bytearray, 10**11)}})),
        ("a.pth", saved({"model": {"w": EVAL}})),
        ("a.pth", saved({"model": {"w": Calls(codecs.encode, "aa", "hex")}})),
        ("a.pth", saved(parts()[2])[:5000]),
        ("a.pkl", pickle.dumps({"model": {"w": Calls(np.ndarray, (2 * 10**9,))}}, protocol=2)),
        ("a.pkl", pickle.dumps({"model": {"w": np.array([None])}}, protocol=2)),
        ("a.pkl", b"\x80\x02}r\xff\xff\xff\x7f."),
        ("a.pkl", b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"."),
        ("a.pkl", pickle.dumps({"model": EVAL})),
        ("a.pkl", b""),
    ],
    ids=["bytearray", "eval", "codec", "cut off", "ndarray", "objects", "memo", "bytes", "eval.pkl", "empty"],
)
def test_files_of_other_libraries_are_data(capsys, data, tmp_path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert "cannot be read as weights alone" in refused(capsys, "val", f"model={tmp_path / name}", f"data={data}")


@pytest.mark.parametrize("name", ["a.torchscript", "a.engine", "a.mnn", "a.txt", "a.safetensors"])
def test_programs_of_other_kinds_are_not_opened(capsys, data, tmp_path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert "give a model name, or an existing .pt" in refused(capsys, "val", f"model={tmp_path / name}", f"data={data}")


@pytest.mark.parametrize("place", ["../secret.bin", "../../../../../etc/passwd", "{folder}/secret.bin"])
@pytest.mark.parametrize("mode", ["val", "benchmark"])
def test_an_onnx_file_reads_nothing_outside_its_folder(capsys, data, teacher, tmp_path, place: str, mode: str) -> None:
    import onnx

    (tmp_path / "secret.bin").write_bytes(b"\0" * 64)
    weight = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in {"location": place.format(folder=tmp_path), "offset": "0", "length": "16"}.items():
        weight.external_data.add(key=key, value=value)
    ends = [onnx.helper.make_tensor_value_info(name, 1, [4]) for name in ("images", "output0")]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["images", "w"], ["output0"])], "g", *[[x] for x in ends], [weight]
    )
    path = tmp_path / "model" / "a.onnx"
    path.parent.mkdir()
    path.write_bytes(
        onnx.helper.make_model(
            graph, ir_version=9, opset_imports=[onnx.helper.make_opsetid("", 17)]
        ).SerializeToString()
    )
    words = [f"model={path}"] if mode == "val" else [f"model={teacher}", f"others={path}"]
    assert "is not an ONNX file that onnxruntime" in (text := refused(capsys, mode, *words, f"data={data}"))
    assert "External data path" in text


def test_data_of_these_tests_is_whole(tmp_path) -> None:
    (tmp_path / "a.pt").write_bytes(saved(good()))
    model, _ = load_model(tmp_path / "a.pt")
    data = write_data(tmp_path / "data")
    assert main(["val", f"model={tmp_path / 'a.pt'}", f"data={data}", "imgsz=64"]) == 0
    assert model.names == {0: "a", 1: "b"}
