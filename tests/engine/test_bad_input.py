"""Every mistake a user can make gets one clear sentence, exit status 2, and no traceback."""

import re

import pytest
import torch
from engine_helpers import write_data

from gid_yolo.cfg import MODELS_DIR
from gid_yolo.cli import main
from gid_yolo.engine.checkpoint import load_model
from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.errors import UserError

FAST = ["epochs=1", "imgsz=64", "batch=4", "plots=False", "teacher_min_ap=0"]


def sentence(capsys, *words) -> str:
    """What the command line says about `words`; exactly one line on stderr."""
    capsys.readouterr()
    assert main(list(words)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gid ")]
    assert len(lines) == 1
    assert "Traceback" not in lines[0]
    return lines[0]


def test_unknown_mode(capsys):
    assert "'trian' is not a mode: choose from train" in sentence(capsys, "trian")


def test_unknown_argument_suggests_the_known_one(capsys):
    text = sentence(capsys, "train", "gid_topk=5")
    assert "'gid_topk' is not a valid argument" in text
    assert "gid_top_k=10" in text


def test_a_word_that_is_no_argument(capsys):
    assert "write key=value" in sentence(capsys, "train", "epochs")


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("distill=kd", "distill=kd names kd: give none, or some of gid, fitnet"),
        ("seed=36893488147419103232", "seed=36893488147419103232 must be a whole number from 0 to 4294967295"),
        ("imgsz=64.5", "imgsz=64.5 must be a whole number, or height and width"),
        ("imgsz=[]", "imgsz=[] must be a whole number, or height and width"),
        ("cfg=[1]", "cfg=[1] must be a text"),
        ("recipe=[1]", "recipe=[1] must be a text"),
        ("data=[1]", "data=[1] must be a text"),
        ("teacher=1", "teacher=1 must be a text"),
        ("name=../../up", "name=../../up leads out of the runs' folder: give project= another one"),
        ("optimizer=foo", "optimizer=foo is unknown: "),
        ("augmentations=[1]", "augmentations=[1] must be a list of Albumentations"),
        ("workers=-1", "workers=-1 must be a whole number of at least 0"),
        ("batch=0", "batch=0 must be a whole number of at least 1"),
        ("batch=-3", "batch=-3 must be a whole number of at least 1"),
        ("batch=2.0", "batch=2.0 must be a whole number of at least 1"),
        ("warmup_epochs=-1", "warmup_epochs=-1 must be a number of at least 0"),
        ("close_mosaic=-1", "close_mosaic=-1 must be a whole number of at least 0"),
        ("time=0", "time=0 must be a number of hours over 0"),
        ("frozen_stages=99", "frozen_stages=99 is more than the 5 stages of this backbone"),
        ("degrees=1e999", "degrees=inf must be a finite number"),
        ("cache=foo", "cache=foo is unknown: choose from True, False, ram, disk"),
        ("fitnet_weight=-1", "fitnet_weight=-1 must be a number of at least 0"),
        ("gid_types=positive", "gid_types=positive names positive: give all, gt, or some of pos, semi, neg"),
        ("gid_top_k=0", "gid_top_k=0 must be a whole number of at least 1"),
        ("gid_top_k=2.5", "gid_top_k=2.5 must be a whole number"),
        ("gid_iou=abc", "gid_iou=abc must be a number"),
        ("momentum=1.0", "momentum=1.0 must be under 1"),
        ("ema_decay=2", "ema_decay=2 must be a number from 0 to 1"),
        ("device=0", "device=0"),
        ("freeze=nosuch", "there is no part 'nosuch'"),
        ("gid_feature=much", "gid_feature=much must be a number"),
        ("gid_iou=3", "gid_iou=3 must be a number from 0 to 1"),
        ("gid_adapt_kernel=2", "must be odd"),
        ("imgsz=32", "imgsz=32 is too small"),
        ("epochs=many", "epochs"),
        ("lr0=7", "lr0"),
        ("freeze=3", "freeze=3 counts YOLO layers"),
        ("backbone=resnet19", "backbone=resnet19 cannot be used"),
        ("backbone_weights=nowhere.safetensors", "backbone_weights=nowhere.safetensors does not exist"),
    ],
)
def test_values_that_cannot_work(capsys, data, word, says):
    words = [w for w in FAST if w.split("=")[0] != word.split("=")[0]]
    assert says in sentence(capsys, "train", "model=retina_nano", f"data={data}", *words, word)


def test_unknown_model(capsys, data):
    text = sentence(capsys, "train", "model=retina_mbv3", f"data={data}")
    assert "retina_mbv3" in text
    assert "retina_mbv2" in text  # did you mean


def test_missing_model_file(capsys):
    assert "model=gone.pt does not exist" in sentence(capsys, "val", "model=gone.pt")


def test_missing_model_argument(capsys):
    assert "model= is missing" in sentence(capsys, "val")


def test_a_model_that_is_a_folder_or_like_nothing(capsys, tmp_path):
    text = sentence(capsys, "val", f"model={tmp_path}", "data=x.yaml")
    assert f"model={tmp_path} is a folder: give a file in it, such as weights/best.pt" in text
    assert "did you mean retina_nano" in sentence(capsys, "val", "model=retina_nana", "data=x.yaml")
    assert "a known model: choose from fcos_" in sentence(capsys, "val", "model=xyzzy", "data=x.yaml")


def test_missing_data_yaml(capsys):
    text = sentence(capsys, "train", "model=retina_nano", "data=gone.yaml", *FAST)
    assert "gone.yaml" in text


def test_data_without_boxes(capsys, tmp_path):
    data = write_data(tmp_path / "empty", boxes=False)
    assert "has no boxes in its train split" in sentence(capsys, "train", "model=retina_nano", f"data={data}", *FAST)


def test_teacher_name_that_is_unknown(capsys, data):
    text = sentence(capsys, "train", f"data={data}", "teacher=retina_r1001", *FAST)
    assert "neither a file of weights (.pt, .pth, .pkl) nor a known model" in text


def test_teacher_file_that_is_missing(capsys, data):
    assert "teacher=gone.pt does not exist" in sentence(capsys, "train", f"data={data}", "teacher=gone.pt", *FAST)


@pytest.mark.parametrize("kind", ["html", "empty", "tensor", "state_dict", "truncated", "segmenter"])
def test_teacher_file_that_is_no_checkpoint(capsys, data, tmp_path, teacher, kind):
    path = tmp_path / "bad.pt"
    if kind == "html":
        path.write_text("<html><body>404 not found</body></html>")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "state_dict":
        torch.save({"backbone.weight": torch.zeros(3)}, path)
    elif kind == "truncated":
        path.write_bytes(teacher.read_bytes()[:5000])
    else:
        from ultralytics import YOLO

        YOLO("yolo11n-seg.yaml").save(path)
    text = sentence(capsys, "train", f"data={data}", f"teacher={path}", *FAST)
    assert f"teacher={path}" in text
    assert "not a checkpoint" in text or "neither a detector of gid-yolo nor a YOLO detector" in text


def test_classes_that_do_not_fit_the_teacher(capsys, tmp_path, teacher):
    data = write_data(tmp_path / "other", names=("horse", "zebra"))
    text = sentence(capsys, "train", f"data={data}", f"teacher={teacher}", *FAST)
    assert "the teacher knows 2 classes (a, b) but none of the 2 that are trained (horse, zebra)" in text


def test_a_teacher_at_chance(capsys, data, teacher):
    words = [w for w in FAST if not w.startswith("teacher_min_ap")]
    text = sentence(capsys, "train", f"data={data}", f"teacher={teacher}", *words, "teacher_min_ap=101")
    assert "under teacher_min_ap=101: it has nothing to teach" in text


def test_a_teacher_with_other_anchors(capsys, data, tmp_path, teacher):
    text = (MODELS_DIR / "retina_nano.yaml").read_text()
    for change, says in (
        (("anchor_scale: 2.0", "anchor_scale: 4.0"), "different anchors"),
        (("anchor_octaves: 3", "anchor_octaves: 2"), "cannot be compared one to one"),
    ):
        path = tmp_path / "other.pt"  # trained already: a new student would take over the teacher's anchors
        path.with_suffix(".yaml").write_text(text.replace(*change))
        model = GIDDetectionModel(path.with_suffix(".yaml"), nc=2, verbose=False)
        torch.save({"model": model, "train_args": {"model": "other", "task": "detect"}}, path)
        assert says in sentence(capsys, "train", f"model={path}", f"data={data}", f"teacher={teacher}", *FAST)


def test_a_new_student_takes_over_the_teachers_anchors(data, tmp_path, teacher):
    text = (MODELS_DIR / "retina_nano.yaml").read_text().replace("anchor_scale: 2.0", "anchor_scale: 4.0")
    (tmp_path / "other.yaml").write_text(text)
    arguments = ["train", f"model={tmp_path / 'other.yaml'}", f"data={data}", f"teacher={teacher}", *FAST]
    assert main([*arguments, "teacher_min_ap=0", f"project={tmp_path}", "name=run"]) == 0
    student, _ = load_model(tmp_path / "run" / "weights" / "best.pt")
    assert student.yaml["settings"]["anchor_scale"] == 2.0
    images = torch.zeros(1, 3, 64, 64)
    assert torch.equal(student.raw(images)[1].priors, load_model(teacher)[0].raw(images)[1].priors)


def test_cfg_file_that_is_missing_or_no_yaml(capsys, tmp_path):
    assert "cfg=gone.yaml does not exist" in sentence(capsys, "train", "cfg=gone.yaml")
    (tmp_path / "bad.yaml").write_text("just words")
    assert "must hold 'key: value' lines" in sentence(capsys, "train", f"cfg={tmp_path / 'bad.yaml'}")


def test_a_split_that_the_data_lacks(capsys, data, teacher):
    text = sentence(capsys, "val", f"model={teacher}", f"data={data}", "split=test", "imgsz=64")
    assert "split=test" in text


def test_resuming_a_finished_run(capsys, teacher):
    text = sentence(capsys, "train", "resume=True", f"model={teacher}")
    assert "finished run" in text


def test_cfg_outside_training(capsys, teacher):
    assert "cfg=a.yaml is for gid-train" in sentence(capsys, "val", f"model={teacher}", "cfg=a.yaml")


@pytest.mark.parametrize("mode", ["val", "export", "predict"])
def test_an_untrained_model(capsys, mode):
    assert "is untrained" in sentence(capsys, mode, "model=retina_nano", "source=x.png")


@pytest.mark.parametrize("word", ["quantize=4", "quantize=w8a16", "quantize=[8]"])
def test_export_in_an_unknown_precision(capsys, teacher, word):
    text = sentence(capsys, "export", f"model={teacher}", word, "imgsz=64")
    assert "is not supported: give quantize=16 for FP16, quantize=8 for INT8" in text


def test_validation_on_other_classes(capsys, tmp_path, teacher):
    data = write_data(tmp_path / "others", names=("b", "c"))
    text = sentence(capsys, "val", f"model={teacher}", f"data={data}", "imgsz=64")
    assert "knows 2 classes (a, b), but data=" in text
    assert "imgsz=32 is too small" in sentence(capsys, "val", f"model={teacher}", f"data={data}", "imgsz=32")


@pytest.mark.parametrize("word", ["classes=[7]", "classes=-1", "classes=[0.5]", "classes=[True]", "classes=a"])
def test_classes_that_do_not_exist(capsys, data, teacher, word):
    text = f"{word} must be ids of the classes that exist: 0 (a), 1 (b)."
    source = f"source={data.parent / 'images' / 'val'}"
    for mode, words in (("train", FAST), ("val", ["imgsz=64"]), ("predict", ["imgsz=64", source])):
        assert text in sentence(capsys, mode, f"model={teacher}", f"data={data}", word, *words)
    assert text in sentence(capsys, "train", f"data={data}", f"teacher={teacher}", word, *FAST)


@pytest.mark.parametrize("word", ["conf=1.5", "iou=-1", "max_det=0", "conf=sure"])
@pytest.mark.parametrize("mode", ["val", "predict", "export"])
def test_limits_that_cannot_be(capsys, data, teacher, mode, word):
    words = [f"model={teacher}", f"data={data}", "imgsz=64", word]
    text = sentence(capsys, mode, *words, *(["source=x.png"] if mode == "predict" else []))
    assert f"{word} must" in text


def test_predictions_are_saved(teacher, data, tmp_path):
    source = data.parent / "images" / "val"
    assert (
        main(["predict", f"model={teacher}", f"source={source}", "imgsz=64", f"project={tmp_path}", "name=pred"]) == 0
    )
    assert len(list((tmp_path / "pred").iterdir())) == 4


def test_resume_without_a_run(capsys):
    assert "resume=True needs the run" in sentence(capsys, "train", "resume=True")


def test_export_to_another_format(capsys, teacher):
    assert "format=engine is not supported" in sentence(capsys, "export", f"model={teacher}", "format=engine")


def test_export_that_is_too_small(capsys, teacher):
    assert "imgsz=32 is too small" in sentence(capsys, "export", f"model={teacher}", "imgsz=32")


def test_predict_without_source(capsys, teacher):
    assert "source= is missing" in sentence(capsys, "predict", f"model={teacher}")


def test_predict_a_source_that_is_missing(capsys, teacher):
    assert "gone.jpg" in sentence(capsys, "predict", f"model={teacher}", "source=gone.jpg")


def test_predict_skips_and_counts_images_that_cannot_be_read(capsys, tmp_path, teacher, caplog):
    data = write_data(tmp_path / "some")
    folder = data.parent / "images" / "val"
    (folder / "1.png").write_bytes(b"not an image")
    from gid_yolo import GID

    model = GID(teacher)
    found = model.predict(str(folder), imgsz=64, verbose=False)
    assert len(found) == 3  # 4 written, 1 unreadable
    assert model.predictor.unreadable == [str(folder / "1.png")]


def test_a_place_that_cannot_be_written(capsys, tmp_path, data):
    (tmp_path / "file").write_text("")
    words = ("train", "model=retina_nano", f"data={data}", *FAST)
    assert "file/train/weights cannot be used (Not a directory)" in sentence(
        capsys, *words, f"project={tmp_path / 'file'}"
    )
    for place, reason in (("/proc/none", "No such file or directory"), (tmp_path / ("x" * 300), "File name too long")):
        assert f"cannot be used ({reason}): give another place" in sentence(capsys, *words, f"project={place}")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("name: [1]", "name=[1] must be a text"),
        ("project: [a]", "project=['a'] must be a text"),
        ("name: ../../up", "name=../../up leads out of the runs' folder"),
    ],
)
def test_a_file_of_arguments_names_its_run_by_a_text(capsys, tmp_path, data, line, says):
    (tmp_path / "args.yaml").write_text(f"{line}\ndata: {data}\nmodel: retina_nano\n")
    assert says in sentence(capsys, "train", f"cfg={tmp_path / 'args.yaml'}", *FAST)


def test_a_run_is_resumed_by_its_checkpoint(capsys, tmp_path):
    (tmp_path / "run.pt").mkdir()
    for run in (tmp_path, tmp_path / "run.pt"):
        says = f"={run} is a folder: give the weights/last.pt of the run"
        assert f"model{says}" in sentence(capsys, "train", "resume=True", f"model={run}")
        with pytest.raises(UserError, match=re.escape(f"resume{says}")):
            GIDTrainer(overrides={"model": str(run), "resume": str(run)})


@pytest.mark.parametrize("batch", ["-1", "0.7", "2.0", "0"])
def test_only_a_training_finds_its_batch(capsys, teacher, data, batch):
    source = data.parent / "images" / "val"
    for words in (("val", f"data={data}"), ("predict", f"source={source}"), ("export",)):
        text = sentence(capsys, *words, f"model={teacher}", "imgsz=64", f"batch={batch}")
        assert f"batch={batch} must be a whole number of at least 1" in text
