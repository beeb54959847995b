"""Which runs a study plans, and what its yaml may say."""

from pathlib import Path

import pytest
import yaml
from engine_helpers import FAST, write_data

from gid_yolo.analysis.study import study
from gid_yolo.analysis.study_file import read_study, with_longer, with_models
from gid_yolo.analysis.study_models import family_of
from gid_yolo.analysis.study_plan import Planner
from gid_yolo.cfg import study_names
from gid_yolo.cli import main
from gid_yolo.detectors.build import model_config
from gid_yolo.engine.schedule import check_schedule, stretched
from gid_yolo.errors import UserError

TABLES = [f"table{i}" for i in range(1, 8)]


@pytest.fixture
def plan(tmp_path, data, checkpoints):
    """Rows of a study for the small pair, whose teacher is a trained file."""

    def make(name: str, model: str = "retina_nano", teacher: str | None = None, seeds=(0, 1), longer=None, **common):
        teacher = teacher or checkpoints["retina_nano"]
        planner = Planner(
            data, tmp_path / "runs", {k: v for k, v in {**FAST, **common}.items() if v is not None}, seeds
        )
        groups, _ = with_models(read_study(name), [(family_of(model), model, teacher)])
        groups = groups if longer is None else with_longer(groups, longer)
        return {row.name: row for group in groups for row in planner.rows(group)}

    return make


def test_every_table_of_the_paper_and_the_verdict_ship() -> None:
    assert set(study_names()) == {*TABLES, "verdict"}
    for name in study_names():
        assert read_study(name).groups


def test_figures_are_the_papers() -> None:
    """Its own rows "our gain" are an independent check of the rows they are differences of."""
    gains = {
        ("table2", "RetinaNet"): (2.9, 3.2, 3.5, 2.1, 3.6, 3.6, 3.2, 3.0, 3.8, 2.5),
        ("table2", "FCOS"): (3.5, 3.4, 4.2, 4.2, 4.0, 3.5, 3.8, 5.3, 4.0, 3.8),
        ("table2", "Faster R-CNN"): (1.9, 1.9, 2.1, 1.3, 2.4, 2.7, 2.4, 2.6, 2.4, 2.9),
        ("table3", "RetinaNet"): (2.5, 3.0, 2.8, 2.8, 3.1, 1.7),
        ("table4", "RetinaNet"): (2.4, 1.9, 2.4, 2.3, 2.5, 2.3),
    }
    for (name, group), expected in gains.items():
        file = read_study(name)
        rows = {row.name: row.paper for g in file.groups if g.name == group for row in g.rows}
        found = [round(rows["GID"][c] - rows["student"][c], 1) for c in file.columns]
        assert found == list(expected), (name, group)


def test_tables_5_to_7_measure_from_one_student() -> None:
    plain = {
        row.paper["mAP"]
        for name in TABLES[4:]
        for row in read_study(name).groups[0].rows
        if row.kind == "plain"
    }  # fmt: skip
    best = {max(row.paper["mAP"] for row in read_study(name).groups[0].rows) for name in TABLES[4:]}
    assert (plain, best) == ({36.2}, {39.1})


def test_rows_differ_in_nothing_but_what_they_are_of(plan) -> None:
    rows = plan("table7")
    plain, rest = rows.pop("K = 0 (student)"), rows
    assert not any(key.startswith(("gid_", "teacher")) and key != "teacher_min_ap" for key in plain.runs[0].args)
    for name, row in rest.items():
        for seed, run in row.runs.items():
            args = dict(run.args)
            assert args.pop("gid_top_k") == int(name.removeprefix("K = "))
            assert args.pop("teacher_min_ap") == 0
            assert args.pop("distill_until") == 1
            assert args.pop("teacher")
            assert args == plain.runs[seed].args


def test_tables_share_their_common_runs(plan) -> None:
    five, six, seven = plan("table5"), plan("table6"), plan("table7")
    names = [
        {run.name for run in row.runs.values()}
        for row in (five["all GI"], six["feature + relation + response"], seven["K = 10"])
    ]
    assert names[0] == names[1] == names[2]
    assert five["student"].runs[0].name == six["student"].runs[0].name == seven["K = 0 (student)"].runs[0].name
    everything = {run.name for rows in (five, six, seven) for row in rows.values() for run in row.runs.values()}
    assert len(everything) == 2 * (7 + 6 + 6 - 2 - 2)  # two seeds; two rows stand in all three tables


def test_a_run_is_named_by_what_is_learnt(plan, checkpoints, tmp_path) -> None:
    def name(**kwargs) -> str:
        return plan("verdict", **kwargs)["distilled"].runs[0].name

    usual = name()
    assert name(device="cpu", workers=3, cache="ram", teacher_min_ap=50) == usual
    moved = tmp_path / "moved.pt"
    moved.write_bytes(Path(checkpoints["retina_nano"]).read_bytes())
    assert name(teacher=str(moved)) == usual
    weights = tmp_path / "weights.pt"
    names = set()
    for content in (b"a", b"b"):
        weights.write_bytes(content)
        names.add(name(backbone_weights=str(weights)))
    assert len(names) == 2
    changed = [name(epochs=2), name(imgsz=96), name(gid_feature=1e-4), name(model="retina_r18")]
    assert len({usual, *changed}) == 5
    assert plan("verdict")["plain"].runs[0].name == plan("verdict", gid_feature=1e-4)["plain"].runs[0].name


def test_trust_reaches_every_run_and_names_none(plan) -> None:
    trusted, others = plan("verdict", trust=True), plan("verdict")
    assert trusted.keys() == others.keys()
    for name, row in trusted.items():
        for seed, run in row.runs.items():
            assert run.args["trust"] is True
            assert run.name == others[name].runs[seed].name


def test_a_teacher_by_name_is_trained_first_and_once(plan, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    rows = plan("verdict", teacher="retina_r10", teacher_epochs=5, classes=[1])
    trained = rows["teacher"].runs[0]
    assert (trained.args["model"], trained.args["epochs"], trained.args["classes"]) == ("retina_r10", 5, [1])
    assert trained.args["imgsz"] == FAST["imgsz"]
    for run in rows["distilled"].runs.values():
        assert run.needs is trained
        assert Path(run.args["teacher"]).parts[-3:] == (trained.name, "weights", "best.pt")


def test_both_students_have_the_teachers_anchors(plan, tmp_path) -> None:
    wide = {
        **model_config("retina_small"),
        "settings": {**model_config("retina_small")["settings"], "anchor_scale": 4.0},
    }
    wide.pop("yaml_file")
    own = tmp_path / "wide.yaml"
    own.write_text(yaml.safe_dump(wide))
    rows = plan("verdict", teacher="retina_small")
    assert rows["plain"].runs[0].args["model"] == "retina_nano"
    planner = Planner(Path("data.yaml"), tmp_path / "runs", {}, (0,))
    student = planner._student("retina_nano", str(own))
    assert model_config(student)["settings"]["anchor_scale"] == 4.0
    assert model_config(student)["backbone"] == model_config("retina_nano")["backbone"]


def test_a_recipe_reaches_every_run(plan, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    rows = plan("verdict", teacher="retina_r10", recipe="paper_voc", epochs=None)
    runs = [run for row in rows.values() for run in row.runs.values()]
    assert len(runs) == 5
    for run in runs:
        assert (run.args["iterations"], run.args["lr_steps"]) == (18000, [12000, 16000])
        assert "recipe" not in run.args
        assert Path(run.args["data"]).name == "data.yaml"  # the study's


def test_a_recipe_cannot_distil_the_plain_student(plan, tmp_path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("teacher: nowhere.pt\ngid_top_k: 3\nlr0: 0.003\n")
    rows = plan("verdict", recipe=str(recipe), teacher_min_ap=None)
    plain, distilled = rows["plain"].runs[0].args, rows["distilled"].runs[0].args
    assert not any(key.startswith(("gid_", "teacher")) for key in plain)
    assert plain["lr0"] == distilled["lr0"] == 0.003
    assert Path(distilled["teacher"]).name == "best.pt"  # the study's


def test_a_teacher_of_its_own_length_has_no_steps_of_the_recipe(plan, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    args = (
        plan("verdict", teacher="retina_r10", recipe="paper_voc", epochs=None, teacher_epochs=5)["teacher"].runs[0].args
    )
    assert (args["epochs"], args["iterations"], args["lr_steps"], args["warmup_iterations"]) == (5, None, None, None)


def test_no_run_stops_before_another(plan) -> None:
    assert {run.args["patience"] for row in plan("table7").values() for run in row.runs.values()} == {0}
    assert plan("verdict", patience=7)["plain"].runs[0].args["patience"] == 7


def test_a_longer_plain_student_trains_by_the_same_schedule_drawn_out(plan) -> None:
    rows = plan("table6", longer=2.5, epochs=4, lr_steps=[2, 3], seeds=(0, 1))
    names = list(rows)
    row = rows["plain, 2.5 times as long"]
    assert names.index(row.name) == names.index("student") + 1
    plain, longer = rows["student"].runs[1].args, row.runs[1].args
    apart = {key: longer[key] for key in longer if longer[key] != plain.get(key)}
    assert apart == {"epochs": 10, "lr_steps": [5.0, 7.5]}  # 2.5 times 4, and 2 and 3
    assert row.runs[1].args.keys() <= {*plain, "lr_steps"}
    by_batches = plan("table6", longer=2, epochs=None, iterations=30, lr_steps=[20])["plain, 2 times as long"]
    assert by_batches.runs[0].args["iterations"] == 60
    assert by_batches.runs[0].args["lr_steps"] == [40]
    assert "epochs" not in by_batches.runs[0].args
    assert plan("table6", epochs=10, lr_steps=[5.0, 7.5])["student"].runs[1].name == row.runs[1].name  # trained once


def test_a_longer_plain_student_of_a_recipe_follows_it(plan, tmp_path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("data: coco8.yaml\nteacher: theirs.pt\ngid_top_k: 5\nepochs: 6\nlr_steps: [4]\n")
    rows = plan("table6", longer=2, epochs=None, recipe=str(recipe))
    plain, longer = rows["student"].runs[0].args, rows["plain, 2 times as long"].runs[0].args
    assert longer == {**plain, "epochs": 12, "lr_steps": [8]}  # its data is the study's, and it has no teacher
    recipe.write_text("iterations: 60\nlr_steps: [40]\n")
    rows = plan("table6", longer=1.5, epochs=None, recipe=str(recipe))
    assert rows["plain, 1.5 times as long"].runs[0].args["iterations"] == 90
    assert "epochs" not in rows["plain, 1.5 times as long"].runs[0].args
    over = plan("table6", longer=1.5, epochs=4, lr_steps=[2], recipe=str(recipe))["plain, 1.5 times as long"]
    assert over.runs[0].args["epochs"] == 6


@pytest.mark.parametrize(
    ("given", "times", "expected"),
    [
        ({"epochs": 4}, 1.1, {"epochs": 5}),  # 4.4
        ({"epochs": 15}, 1.5, {"epochs": 23}),  # 22.5
        ({"epochs": 10}, 1.1, {"epochs": 11}),  # in binary numbers a little over
        ({"epochs": 3, "lr_steps": [2.9]}, 1.1, {"epochs": 4, "lr_steps": [4 * 2.9 / 3]}),
        ({"epochs": 9, "iterations": 30, "lr_steps": [28, 29]}, 1.02, {"iterations": 31, "lr_steps": [29, 30]}),
        ({"epochs": 5, "lr_steps": 3}, 2, {"epochs": 10, "lr_steps": [6]}),
    ],
)
def test_a_schedule_is_drawn_out(given, times, expected) -> None:
    found = stretched(given, times)
    assert found == expected
    check_schedule({**given, **found})


def test_a_setting_of_what_a_row_turns_off_is_not_given_to_it(plan) -> None:
    rows = plan("table6", gid_level="size", gid_weighting="score", distill_clip="apart")
    given = {"gid_level", "gid_weighting", "distill_clip"}
    told = {name: given & set(row.runs[0].args) for name, row in rows.items()}
    assert told["feature"] == told["feature + response"] == given
    assert told["relation"] == given - {"gid_weighting"}  # whose instances do not weigh differently
    assert told["response"] == set()


def test_a_data_set_of_ultralytics_keeps_its_name(monkeypatch, tmp_path) -> None:
    """It is looked for where Ultralytics keeps data, from whatever folder a study is started."""
    from gid_yolo.analysis import study as module

    names = {0: "a"}
    monkeypatch.setattr(module, "read_data", lambda data, split, trust: (Path(data), {"names": names}))
    lines = study(
        "verdict", model="retina_nano", teacher="retina_small", data="coco8.yaml", project=str(tmp_path), plan=True
    )
    assert {run.args["data"] for line in lines for run in line.row.runs.values()} == {"coco8.yaml"}


def test_pairs_may_be_listed_on_the_command_line(data, tmp_path) -> None:
    words = [
        "model=[retina_nano,fcos_nano]",
        "teacher=[retina_small,fcos_small]",
        f"data={data}",
        f"project={tmp_path}",
    ]
    assert main(["study", "table1", *words, "seeds=1", "plan=True"]) == 0


def test_models_of_ones_own_take_the_places_of_their_kinds() -> None:
    groups, left_out = with_models(
        read_study("table1"), [("fcos", "fcos_nano", "t.pt"), ("retinanet", "retina_nano", "u.pt")]
    )
    assert [(g.name, g.model, g.teacher) for g in groups] == [
        ("RetinaNet", "retina_nano", "u.pt"),
        ("FCOS", "fcos_nano", "t.pt"),
    ]
    assert left_out == ["Faster R-CNN"]
    assert [row.name for row in groups[1].rows] == ["teacher", "student", "FitNet", "GID"]  # the paper's empty cells


PAIR = {"name": "verdict", "model": "retina_nano", "teacher": "retina_small"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "table8"}, "'table8' is not known: give table"),
        ({"name": "verdict"}, "model= and teacher= are both needed"),
        ({"name": "table7", "gid_top_k": 3}, "gid_top_k= is what the rows of table7 differ in"),
        ({"name": "table7", "seed": 3}, "seed= is what gid-study sets"),
        ({"name": "table7", "sedes": 3}, "sedes"),
        ({"name": "table7", "seeds": 0}, "seeds=0 must be how many"),
        ({"name": "table7", "seeds": [1, 1]}, "must be how many"),
        ({"name": "table7", "seeds": True}, "must be how many"),
        ({**PAIR, "longer": 1}, "longer=1 must be a number above 1"),
        ({**PAIR, "longer": [2]}, "longer=[2] must be a number above 1"),
        ({"name": "table7", "jobs": 0}, "jobs=0 must be a whole number"),
        ({"name": "table7", "model": "retina_nano"}, "teacher= is missing"),
        ({"name": "table7", "teacher": "a.pt"}, "model= is missing"),
        ({"name": "table7", "model": ["retina_nano", "fcos_nano"], "teacher": ["a.pt"]}, "must be pairs"),
        ({"name": "table1", "model": "yolo11n.yaml", "teacher": "a.pt"}, "is a yolo, and table1 compares"),
        ({"name": "table7", "model": ["retina_nano", "fcos_nano"], "teacher": ["a.pt", "b.pt"]}, "one pair at a time"),
        ({"name": "table7", "model": "retina_nano", "teacher": "nowhere.pt"}, "nowhere.pt does not exist"),
        ({"name": "table7", "model": "retina_nino", "teacher": "nowhere.pt"}, "did you mean retina_nano"),
        ({**PAIR, "epochs": "abc"}, "epochs=abc"),
        ({**PAIR, "lr_steps": [3, 2]}, "lr_steps=[3, 2] must increase"),
        ({**PAIR, "gid_feature": 0, "gid_relation": 0, "gid_response": 0}, "distill=gid asks for gid, but"),
        ({**PAIR, "time": 1}, "time=1 would give every run another budget"),
        ({**PAIR, "batch": -1}, "batch=-1 would give every run another budget"),
        ({**PAIR, "device": 7}, "device=7 cannot be used"),
        ({**PAIR, "distill": "none"}, "distill=none leaves nothing to judge"),
        ({**PAIR, "name": "table5", "distill": "fitnet"}, "distill= does not go with table5"),
        ({**PAIR, "teacher": "retina_smoll"}, "teacher=retina_smoll is neither a file of weights"),
        ({**PAIR, "teacher": "fcos_small"}, "the teacher is a fcos and the student a retinanet"),
        ({**PAIR, "project": "/proc/nowhere", "plan": False}, "project=/proc/nowhere cannot be written to"),
        ({"name": "table4"}, "the class person, which the data (a, b) does not have"),
        ({"name": "table4", "classes": [7]}, "7"),
        ({"name": "table7", "split": "tset"}, "split=tset"),
        ({"name": "table7", "imgsz": 3}, "imgsz=3 is too small"),
    ],
)  # fmt: skip
def test_what_cannot_be_studied_is_said_in_one_sentence(arguments, message, data, tmp_path) -> None:
    with pytest.raises(UserError) as error:
        study(**{"data": str(data), "project": str(tmp_path), "plan": True, **arguments})
    assert message in str(error.value)


def test_a_teacher_that_could_not_be_measured_is_refused_before_students_are_trained(checkpoints, tmp_path) -> None:
    more = write_data(tmp_path / "three", names=("a", "b", "c"))
    given = {**PAIR, "teacher": checkpoints["retina_nano"], "project": str(tmp_path / "study"), "plan": True}
    with pytest.raises(UserError, match=r"teacher=.*best\.pt knows 2 classes \(a, b\), but data=.* has 3 \(a, b, c\)"):
        study(**given, data=str(more))


GROUP = {
    "name": "g",
    "model": "retina_nano",
    "teacher": "a.pt",
    "rows": [{"name": "p", "kind": "plain"}, {"name": "d"}],
}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"columns": ["mAP"], "groups": [GROUP]}, "lacks 'title:'"),
        ({"title": "t", "columns": ["mAPP"], "groups": [GROUP]}, "['mAPP'] must be some of mAP"),
        ({"title": "t", "columns": [], "groups": [GROUP]}, "must be some of mAP"),
        ({"title": "t", "columns": ["mAP"], "groups": [{"name": "g"}]}, "lacks 'rows:'"),
        ({"title": "t", "columns": ["mAP"], "groups": [{**GROUP, "rows": [{"name": "d"}]}]}, "one row of kind: plain"),
        ({"title": "t", "columns": ["mAP"], "groups": [{**GROUP, "rows": GROUP["rows"] * 2}]}, "have one name"),
        ({"title": "t", "columns": ["mAP"], "groups": [{**GROUP, "rows": [{"nam": "d"}]}]}, "lacks 'name:'"),
        ({"title": "t", "columns": ["mAP"], "groups": [{**GROUP, "rows": [{"name": "d", "kind": "x"}]}]}, "kind: x"),
        (
            {"title": "t", "columns": ["mAP"], "groups": [{**GROUP, "rows": [{"name": "d", "args": {"gid_topk": 3}}]}]},
            "gid_topk",
        ),
        (
            {"title": "t", "columns": ["mAP"], "groups": [{**GROUP, "rows": [{"name": "d", "args": {"gid_iou": 3}}]}]},
            "gid_iou=3",
        ),
        ({"title": "t", "columns": ["mAP"], "groups": [GROUP, GROUP]}, "two groups have one name"),
        (
            {
                "title": "t",
                "columns": ["mAP"],
                "groups": [{**GROUP, "rows": [{"name": "d", "paper": {"mAP": "good"}}]}],
            },
            "must hold numbers",
        ),
        ([1], "key: value"),
    ],
)
def test_a_yaml_that_is_no_study_is_refused(contents, message, tmp_path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(contents))
    with pytest.raises(UserError) as error:
        read_study(file)
    assert message in str(error.value)
    assert "mine.yaml" in str(error.value)
