"""`recipe=`: what the shipped ones hold, which argument wins, and how a run of one is repeated."""

import json

import pytest
import yaml
from engine_helpers import FAST

import gid_yolo.engine.data_set
from gid_yolo import GID
from gid_yolo.cfg import MODELS_DIR, RECIPES_DIR, load_yaml, recipe_names
from gid_yolo.cli import main
from gid_yolo.engine.config import DEFAULTS
from gid_yolo.engine.recipe import FAMILIES, expand, read_recipe
from gid_yolo.engine.schedule import schedule_of
from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.engine.values import check_values
from gid_yolo.errors import UserError

# images of the training set, iterations, milestones, epochs (section 4 of the paper)
PAPER = {"paper_coco": (118287, 180000, (120000, 160000), 24.3), "paper_voc": (16551, 18000, (12000, 16000), 17.4)}
AUGMENTATIONS = (
    *("mosaic", "mixup", "cutmix", "copy_paste", "hsv_h", "hsv_s", "hsv_v", "bgr", "degrees", "translate", "scale"),
    *("shear", "perspective", "flipud", "erasing", "multi_scale"),
)


def write(path, **contents):
    path.write_text(yaml.safe_dump(contents))
    return str(path)


# The shipped ones -----------------------------------------------------------------------------------------------------


def test_the_papers_recipes_ship():
    assert recipe_names() == sorted(PAPER)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_is_the_papers(name, family):
    args = read_recipe(name, family)
    images, iterations, milestones, epochs = PAPER[name]
    schedule = schedule_of(args, batches=-(-images // args["batch"]), epochs=1)
    assert (schedule.iterations, schedule.milestones, schedule.gamma) == (iterations, milestones, 0.1)
    assert schedule.iterations * args["batch"] / images == pytest.approx(epochs, abs=0.05)
    assert args["batch"] == args["nbs"] == 16
    assert args["lr0"] == (0.02 if family == "faster_rcnn" else 0.01)
    assert (args["optimizer"], args["momentum"], args["weight_decay"]) == ("SGD", 0.9, 1e-4)
    assert args["fliplr"] == 0.5
    assert args["distill_until"] == 1
    assert [args[key] for key in AUGMENTATIONS] == [0.0] * len(AUGMENTATIONS)
    assert args["imgsz"] % 32 == 0
    assert args["augmentations"] == []
    check_values({**DEFAULTS, **args})


@pytest.mark.parametrize("name", PAPER)
def test_every_line_of_the_schedule_is_explained(name):
    lines = (RECIPES_DIR / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    top = lines[: next(i for i, line in enumerate(lines) if line.startswith("# Augmentation"))]
    wanting = [line for line in top if line and "#" not in line]
    assert [line.split(":")[0] for line in wanting] == ["optimizer", "momentum", "weight_decay"]


@pytest.mark.parametrize("depth", ["r50", "r101"])
@pytest.mark.parametrize("family", ["retina", "fcos", "frcnn"])
def test_what_the_recipes_say_of_frozen_parts_holds(family, depth):
    config = load_yaml(MODELS_DIR / f"{family}_{depth}.yaml")
    assert (config["freeze_bn"], config["frozen_stages"]) == (True, 2)
    assert "lr0" not in config.get("train", {})


# Which argument wins --------------------------------------------------------------------------------------------------


def test_arguments_win_over_the_recipe_and_sections_over_the_rest(tmp_path):
    recipe = write(tmp_path / "mine.yaml", lr0=0.1, iterations=50, lr_steps=[30], fcos={"lr0": 0.2})
    assert expand({"recipe": recipe, "seed": 1}, "retinanet") == {
        **{"lr0": 0.1, "iterations": 50, "lr_steps": [30]},
        "seed": 1,
    }
    assert expand({"recipe": recipe}, "fcos")["lr0"] == 0.2
    assert expand({"recipe": recipe, "lr0": 0.3}, "fcos")["lr0"] == 0.3
    assert expand({"recipe": recipe, "epochs": 3, "lr_steps": None}, "fcos") == {
        **{"lr0": 0.2, "iterations": None, "epochs": 3, "lr_steps": None}
    }


def test_a_cfg_file_may_name_a_recipe_and_one_given_beside_it_wins(tmp_path):
    named, beside = (write(tmp_path / f"{x}.yaml", lr0=x, lrf=x, momentum=x) for x in (0.1, 0.2))
    cfg = write(tmp_path / "cfg.yaml", recipe=named, lrf=0.3, model="retina_nano")
    assert expand({"cfg": cfg, "seed": 1}, "fcos") == {"lr0": 0.1, "lrf": 0.3, "momentum": 0.1, "seed": 1}
    assert expand({"cfg": cfg, "recipe": beside, "lr0": 0.5}, "fcos") == {"lr0": 0.5, "lrf": 0.2, "momentum": 0.2}


def test_a_run_of_a_recipe_is_repeated_from_its_args(tmp_path, data):
    # retina_nano's yaml asks for AdamW, lr0 0.004 and 40 epochs
    shared = {**FAST, "data": str(data), "optimizer": "SGD", "lr0": 0.02, "val": False}
    del shared["epochs"], shared["batch"]
    recipe = write(tmp_path / "mine.yaml", **shared, batch=2, iterations=5, lr_steps=[2, 3], retinanet={"lrf": 0.5})
    assert main(["train", "model=retina_nano", f"recipe={recipe}", "batch=4", "lr_steps=[1,3]"]) == 0
    (tmp_path / "mine.yaml").unlink()  # nothing of it is left to be read
    runs = tmp_path / "runs" / "detect"
    assert main(["train", f"cfg={runs / 'train' / 'args.yaml'}"]) == 0
    first, again = (load_yaml(run / "args.yaml") for run in sorted(runs.glob("train*")))
    assert {key for key in first if first[key] != again[key]} == {"name", "save_dir"}
    wanted = {"optimizer": "SGD", "lr0": 0.02, "lrf": 0.5, "batch": 4, "iterations": 5, "lr_steps": [1, 3]}
    assert {key: first[key] for key in wanted} == wanted
    assert (first["epochs"], first["recipe"], first["val"]) == (3, None, False)  # 8 images in batches of 4
    for run in runs.glob("train*"):
        assert (run / "weights" / "best.pt").read_bytes()
        assert json.loads((run / "coco_metrics.json").read_text())["images"] == 4


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        ({"lr00": 1}, r"recipe \S+mine.yaml: 'lr00' is not a valid argument.*lr0"),
        ({"fcos": {"gid_topk": 1}}, r"recipe \S+mine.yaml, fcos: 'gid_topk' is not a valid argument"),
        ({"fcos": 3}, r"mine.yaml, fcos: must hold 'key: value' lines"),
        ({"model": "retina_nano"}, "model belongs to a single run"),
        ({"recipe": "paper_voc"}, "recipe belongs to a single run"),
    ],
)
def test_recipes_that_cannot_work(tmp_path, contents, says):
    with pytest.raises(UserError, match=says):
        read_recipe(write(tmp_path / "mine.yaml", **contents), "retinanet")


def test_recipes_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="recipe=paper_coc is unknown: choose from paper_coco, paper_voc"):
        read_recipe("paper_coc", "retinanet")
    with pytest.raises(UserError, match=r"recipe=gone.yaml does not exist: .* one of paper_coco, paper_voc"):
        read_recipe("gone.yaml", "retinanet")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="must hold 'key: value' lines"):
        read_recipe(tmp_path / "list.yaml", "retinanet")


def test_where_a_recipe_has_no_place(data, capsys):
    with pytest.raises(UserError, match="a resumed one keeps the arguments it began with"):
        expand({"recipe": "paper_voc", "resume": "last.pt"}, "retinanet")
    with pytest.raises(UserError, match=r"recipe=paper_voc is read by gid-train and GID.train"):
        GIDTrainer(overrides={"model": "retina_nano", "recipe": "paper_voc", "data": str(data)})
    assert main(["val", "model=retina_nano", "recipe=paper_voc"]) == 2
    assert "recipe=paper_voc is for gid-train" in capsys.readouterr().err


def test_epochs_beside_a_recipe_of_iterations_need_steps_in_epochs():
    with pytest.raises(UserError, match=r"lr_steps=\[12000, 16000\] must lie inside the run of 5 epochs"):
        GID("retina_nano").train(recipe="paper_voc", epochs=5)


@pytest.mark.parametrize("name", PAPER)
def test_data_that_cannot_be_downloaded_is_one_sentence(name, capsys, monkeypatch):
    monkeypatch.setattr(gid_yolo.engine.data_set, "ONLINE", False)
    assert main(["train", "model=retina_nano", f"recipe={name}"]) == 2
    text = capsys.readouterr().err
    assert "cannot be downloaded without a network" in text
    assert "Traceback" not in text


def test_help_lists_recipes_and_the_schedules_arguments(capsys):
    assert main(["help"]) == 0
    text = capsys.readouterr().out
    for word in ("paper_coco, paper_voc", "recipe:", "iterations:", "lr_steps:", "lr_gamma: 0.1", "warmup_iterations:"):
        assert word in text
