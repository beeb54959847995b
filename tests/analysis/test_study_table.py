"""The table of a study, from results that are made up here, so that every number in it can be derived."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gid_yolo.analysis.study_file import read_study, with_longer
from gid_yolo.analysis.study_lines import tabulate
from gid_yolo.analysis.study_plan import Row, Run, Study
from gid_yolo.analysis.study_table import markdown, write_files
from gid_yolo.analysis.study_verdict import verdict
from gid_yolo.engine.coco_eval import COLUMNS
from gid_yolo.engine.resample import LEAST, Resampled

T_2 = 4.302653  # Student's t, 2 degrees of freedom, 97.5 %


def make(name: str, maps: dict[str, list[float | None]], longer: float | None = None, **columns: float):
    """A study of one group whose rows have these mAP by seed (None: not done); the function that reads results."""
    file = read_study(name)
    rows, found = [], {}
    groups = file.groups if longer is None else with_longer(file.groups, longer)
    for template in groups[0].rows:
        runs = {}
        for seed, value in enumerate(maps.get(template.name, [])):
            run = Run(f"{template.name}-{seed}", {"seed": seed})
            runs[seed] = run
            found[run.name] = None if value is None else {**dict.fromkeys(COLUMNS, 0.0), **columns, "mAP": value}
        rows.append(Row("RetinaNet", template.name, template.kind, runs, template.paper))
    settings = {
        "name": file.name, "models": {"RetinaNet": "small under big"}, "data": "/x/cells.yaml", "split": "val",
        "seeds": (0, 1, 2), "arguments": {"epochs": 8}, "version": "0",
    }  # fmt: skip
    return Study(file, tuple(rows), settings), lambda run: found[run.name]


def cells(text: str) -> dict[str, list[str]]:
    lines = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("|")]
    width = len(lines[0]) + 1
    return {line[0].strip(): [cell.strip() for cell in line[1:width]] for line in lines[2:]}


def test_the_papers_figures_stand_beside_ours() -> None:
    study, results = make("table7", {"K = 0 (student)": [10.0, 12.0, 14.0], "K = 5": [13.0, 14.0, 18.0]})
    text = markdown(study, tabulate(study, results, {}))
    rows = cells(text)
    # plain: mean 12, std 2. K = 5: mean 15, std sqrt(7); gains 3, 2, 4: mean 3, half width t x 1 / sqrt(3) = 2.48
    assert rows["K = 0 (student)"] == ["12.0 ± 2.0 (36.2)", "", "3", ""]
    half = T_2 / math.sqrt(3)
    assert rows["K = 5"] == [
        f"15.0 ± {math.sqrt(7):.1f} (38.9)",
        f"+3.0 [{3 - half:+.1f}, {3 + half:+.1f}] (+2.7)",
        "3",
        "",
    ]
    assert rows["K = 300"][0] == "- (38.6)"
    assert "small under big, on cells.yaml, epochs=8" in text
    assert "(COCO, RetinaNet, ResNet-101 to ResNet-50)" in text


def test_what_is_not_done_is_said() -> None:
    study, results = make("table7", {"K = 0 (student)": [10.0, None], "K = 5": [13.0, None]})
    text = markdown(study, tabulate(study, results, {}))
    assert cells(text)["K = 5"] == ["13.0 (38.9)", "+3.0 (+2.7)", "1 of 2", ""]
    assert "the same command goes on" in text


def test_a_failed_run_is_named_with_its_reason() -> None:
    study, results = make("table7", {"K = 0 (student)": [10.0], "K = 5": [None]})
    text = markdown(study, tabulate(study, results, {"K = 5-0": "gid train: no memory."}))
    assert "FAILED: RetinaNet, K = 5: gid train: no memory." in text
    assert "Not all runs are done: mend what failed, and the same command goes on." in text
    assert cells(text)["K = 5"] == ["- (38.9)", "(+2.7)", "0 of 1", ""]


def test_several_columns_end_in_the_gain_of_the_last_row() -> None:
    study, results = make("table3", {"teacher": [50.0], "student": [30.0], "GID": [32.0]}, AP50=60.0, AP_S=-1.0)
    rows = cells(markdown(study, tabulate(study, results, {})))
    # small objects are absent from the data: no value, no gain, but the paper's gain 19.2 - 16.4
    assert rows["GID"][:4] == ["32.0 (33.5)", "60.0 (51.9)", "0.0 (35.5)", "- (19.2)"]
    assert rows["gain of the last"][:4] == ["+2.0 (+2.5)", "+0.0 (+3.0)", "+0.0 (+2.8)", "(+2.8)"]
    assert rows["teacher"][-3:] == ["", "", ""]


@pytest.mark.parametrize(
    ("distilled", "word", "sentence"),
    [
        ([13.0, 15.0, 17.1], "helped", "Distillation helped: +3.0 mAP (95% interval"),
        ([7.0, 9.0, 10.9], "harmed", "Distillation harmed: -3.0 mAP"),
        ([12.0, 12.0, 16.0], "undecided", "A gain of this size and spread would probably take about"),
        ([13.0], "one seed", "One seed says +3.0 mAP"),
    ],
)
def test_the_verdict(distilled, word, sentence) -> None:
    study, results = make("verdict", {"teacher": [20.0], "plain": [10.0, 12.0, 14.0], "distilled": distilled})
    lines = tabulate(study, results, {})
    said = verdict(study, lines)
    assert said["verdict"] == word
    assert sentence in said["sentence"]
    share = sum(distilled) / len(distilled) / 20
    assert f"The distilled student has {share:.0%} of its teacher's mAP." in said["sentence"]


def drawn(**gains: tuple[float, float]):
    """Twenty images' resamples, in which the rows lie so far above the plain one's at the 2.5 and 97.5 percentiles."""
    maps = {"plain": np.linspace(20, 30, 100)}
    for row, (low, high) in gains.items():
        maps[row] = maps["plain"] + np.repeat([low, high], 50)
    images = tuple(map(str, range(LEAST)))
    return lambda run: Resampled(images, maps[name]) if (name := run.name.rpartition("-")[0]) in maps else None


# Differences of [13, 15, 17.1] from [10, 12, 14]: mean 3.03, standard deviation 0.0577, half width t x 0.0577 / sqrt(3)
# = 0.14; of [12, 12, 16]: mean 1.33, 1.1547, of which 3 seeds leave 4.303 x 0.667 = 2.87, 5 2.776 x 0.516 = 1.43, and 6
# 2.571 x 0.471 = 1.21; of [11.6, 13.9, 16.2]: mean 1.9, 0.3, 4.303 x 0.173 = 0.745. Together with images that reach
# 2.03 below and 1.97 above a mean of 3.03: sqrt(0.14^2 + 2.03^2) = 2.04, sqrt(0.14^2 + 1.97^2) = 1.97; with 1.84 below
# and 2.1 above 1.9: sqrt(0.745^2 + 1.84^2) = 1.985, sqrt(0.745^2 + 2.1^2) = 2.228
@pytest.mark.parametrize(
    ("distilled", "images", "word", "sentence"),
    [
        ([13.0, 15.0, 17.1], (1.0, 5.0), "helped", "Distillation helped: +3.0 mAP (95% interval +1.0 to +5.0: +2.9 to "
         "+3.2 of 3 seeds, +1.0 to +5.0 of other images). The distilled student has"),
        ([7.0, 9.0, 10.9], (-5.0, -1.0), "harmed", "Distillation harmed: -3.0 mAP (95% interval -5.0 to -1.0: -3.2 to "
         "-2.9 of 3 seeds, -5.0 to -1.0 of other images). The"),
        ([11.6, 13.9, 16.2], (0.06, 4.0), "undecided", "Undecided: +1.9 mAP (95% interval -0.1 to +4.1: +1.2 "
         "to +2.6 of 3 seeds, +0.1 to +4.0 of other images). Either error alone leaves 0 out, both together do not: "
         "give more seeds, or measure on more images. The"),
        ([13.0, 15.0, 17.1], (-0.5, 5.0), "undecided", "Undecided: +3.0 mAP (95% interval -0.5 to +5.0: "
         "+2.9 to +3.2 of 3 seeds, -0.5 to +5.0 of other images). The 20 images of val are too few to be certain of "
         "it: measure on more. The"),
        ([12.0, 12.0, 16.0], (1.0, 5.0), "undecided", "seeds, +1.0 to +5.0 of other images). A gain of this size and "
         "spread would probably take about 6 seeds to be certain of. The distilled"),
        ([12.0, 12.0, 16.0], (-1.0, 5.0), "undecided", "spread would probably take about 6 seeds to be certain of. The "
         "20 images of val are too few to be certain of it: measure on more. The distilled"),
        ([13.0, 15.0, 17.1], None, "helped", "Distillation helped: +3.0 mAP (95% interval +2.9 to +3.2 of 3 seeds). "
         "On other images it is not known: not every run has a coco_matches.npz of the same ones. The distilled"),
        ([13.0], (1.0, 5.0), "one seed", "One seed says +3.0 mAP, and nothing about how certain that is: give seeds=3"),
    ],
)  # fmt: skip
def test_a_verdict_is_certain_of_seeds_and_of_images(distilled, images, word, sentence) -> None:
    study, results = make("verdict", {"teacher": [20.0], "plain": [10.0, 12.0, 14.0], "distilled": distilled})
    draws = drawn(**({"distilled": images} if images else {}))
    said = verdict(study, tabulate(study, results, {}, draws=draws))
    assert said["verdict"] == word
    assert sentence in said["sentence"]
    low, high = (said["images"]["low"], said["images"]["high"]) if images else (None, None)
    assert (low, high) == (pytest.approx(images) if images else (None, None))


def test_one_run_without_its_matches_leaves_no_interval_over_images() -> None:
    study, results = make("verdict", {"teacher": [20.0], "plain": [10.0, 12.0], "distilled": [13.0, 15.1]})
    draws = drawn(distilled=(1.0, 5.0))
    lines = tabulate(study, results, {}, draws=lambda run: None if run.name == "plain-1" else draws(run))
    assert lines[-1].cells["mAP"].gain.images is None
    assert "other images" not in markdown(study, lines)
    study, results = make("verdict", {"teacher": [20.0], "plain": [10.0, None], "distilled": [13.0, 15.1]})
    lines = tabulate(study, results, {}, draws=lambda run: None if run.name == "plain-1" else draws(run))
    assert lines[-1].cells["mAP"].gain.images.low == pytest.approx(1)  # that of the seed that both have


def test_the_interval_over_images_stands_under_the_table_and_in_the_files(tmp_path) -> None:
    maps = {"teacher": [20.0], "plain": [10.0, 12.0], LONGER: [11.0, 13.0], "distilled": [13.0, 15.1]}
    study, results = make("verdict", maps, longer=3)
    draws = drawn(**{LONGER: (-1.0, 2.0), "distilled": (1.25, 5.0)})
    lines = tabulate(study, results, {}, draws=draws)
    text = markdown(study, lines)
    assert (
        "Gain in mAP over other images (95% interval, by a bootstrap of the 20 of val): plain, 3 times as long -1.0 to "
        "+2.0; distilled +1.2 to +5.0."
    ) in text
    # over the longer student: 2.25 in the first half of the draws, 3 in the second; by seed 2 and 2.1
    said = verdict(study, lines)
    assert "to +2.7 of 2 seeds, +2.2 to +3.0 of other images)" in said["sentence"]
    assert said["over_longer"]["images"]["high"] == pytest.approx(3)
    files = write_files(study, lines, tmp_path, results)
    with files[1].open(newline="") as stream:
        table = {(row["row"], row["column"]): row for row in csv.DictReader(stream)}
    row = table["distilled", "mAP"]
    assert (row["gain_images_low"], row["gain_images_high"], row["paper"]) == ("1.25", "5.0", "")
    assert (table["distilled", "AP50"]["gain_images_low"], table["plain", "mAP"]["gain_images_low"]) == ("", "")
    saved = json.loads(files[2].read_text())
    assert saved["rows"][-1]["columns"]["mAP"]["gain"]["images"]["low"] == pytest.approx(1.25)
    assert saved["rows"][-1]["columns"]["AP50"]["gain"]["images"] is None
    assert "drawn" not in saved["rows"][-1]


def test_nothing_is_judged_of_students_that_learnt_nothing() -> None:
    for best, word in ((0.9, "undecided"), (1.0, "one seed")):
        study, results = make("verdict", {"teacher": [20.0], "plain": [0.1], "distilled": [best]})
        said = verdict(study, tabulate(study, results, {}))
        assert said["verdict"] == word
        assert ("Neither student reached 1 mAP: train longer" in said["sentence"]) == (best < 1)


@pytest.mark.parametrize(("teacher", "weak"), [(15.0, False), (14.9, True), (11.0, True)])
def test_a_verdict_under_a_weak_teacher_says_so(teacher, weak) -> None:
    study, results = make("verdict", {"teacher": [teacher], "plain": [11.0, 13.0], "distilled": [13.0, 15.0]})
    said = verdict(study, tabulate(study, results, {}))["sentence"]
    assert ("too weak to judge by" in said) == weak  # the plain mean is 12, and the lead that is asked for 3
    if weak:
        assert f"it is {teacher - 12:.1f} mAP ahead of the plain student" in said


def test_the_minutes_are_the_median_of_the_seeds() -> None:
    study, results = make("verdict", {"teacher": [20.0], "plain": [10.0, 12.0, 14.0], "distilled": [13.0, None]})
    seconds = {"plain-0": 540.0, "plain-1": 60.0, "plain-2": 720.0, "distilled-0": 1500.0, "teacher-0": None}
    lines = tabulate(study, results, {}, lambda run: seconds[run.name])
    rows = cells(markdown(study, lines))
    # 540 s of 60, 540, 720; of the distilled runs one is not done; the teacher was trained elsewhere
    assert [rows[name][-1] for name in ("teacher", "plain", "distilled")] == ["", "9.0", "25"]


LONGER = "plain, 3 times as long"


@pytest.mark.parametrize(
    ("longer", "sentence"),
    [
        # differences 1, 1, 1: their interval has no width; 30 minutes are 1.5 times 20
        ([12.0, 14.0, 16.0], "It is 1.0 mAP ahead of the row 'plain, 3 times as long' (95% interval +1.0 to +1.0 of "
         "3 seeds), which trained 1.5 times as long as it did."),
        ([14.0, 14.0, 19.0], "It is 0.7 mAP behind the row"),
        ([12.0, 14.0, None], "ahead of the row 'plain, 3 times as long' (95% interval +1.0 to +1.0 of 2 seeds), which"),
        ([12.0, None, None], "It is 1.0 mAP ahead of the row 'plain, 3 times as long', which trained 1.5 times"),
    ],
)  # fmt: skip
def test_the_verdict_beside_a_plain_student_that_trains_longer(longer, sentence) -> None:
    maps = {"teacher": [14.0], "plain": [10.0, 12.0, 14.0], LONGER: longer, "distilled": [13.0, 15.0, 17.0]}
    study, results = make("verdict", maps, longer=3)
    times = {"plain-": 10, "plain,": 30, "distil": 20}
    lines = tabulate(study, results, {}, lambda run: 60.0 * times[run.name[:6]] if run.name[:6] in times else None)
    said = verdict(study, lines)
    assert "Distillation helped: +3.0 mAP" in said["sentence"]  # which is over the student of the same length
    assert "of its teacher's mAP. It is" in said["sentence"]  # so that "it" is the distilled student
    assert sentence in said["sentence"]
    assert said["sentence"].endswith("train it to its plateau, or take a larger one.")
    common = [(13.0 + 2 * i, value) for i, value in enumerate(longer) if value is not None]
    assert said["over_longer"]["mean"] == pytest.approx(sum(a - b for a, b in common) / len(common))
    rows = cells(markdown(study, lines))
    assert list(rows) == ["teacher", "plain", LONGER, "distilled", "gain of the last"]
    gain = sum(value - plain for value, plain in zip(longer, maps["plain"], strict=True) if value) / len(common)
    assert rows[LONGER][-3].startswith(f"{gain:+.1f}")
    assert rows[LONGER][-1] == "30"


def test_a_longer_plain_student_that_failed_takes_no_verdict_away() -> None:
    maps = {"teacher": [20.0], "plain": [10.0, 12.0], LONGER: [None, None], "distilled": [13.0, 15.1]}
    study, results = make("verdict", maps, longer=3)
    said = verdict(study, tabulate(study, results, {}))
    assert said["verdict"] == "helped"
    assert "over_longer" not in said


@pytest.mark.parametrize(("distilled", "advised"), [(14.0, True), (10.4, False)])
@pytest.mark.parametrize("teacher", [None, 600.0])
def test_a_verdict_says_what_would_be_as_long_by_the_clock(distilled, advised, teacher) -> None:
    study, results = make("verdict", {"teacher": [20.0], "plain": [10.0, 11.0], "distilled": [13.0, 14.0]})
    # of seed 1 nothing is known of the plain run, so that it tells nothing
    minutes = {"plain-0": 10.0, "distilled-0": distilled, "distilled-1": 99.0, "teacher-0": teacher}
    lines = tabulate(study, results, {}, lambda run: None if minutes.get(run.name) is None else 60 * minutes[run.name])
    said = verdict(study, lines)["sentence"]
    own = "'s own training" if teacher is None else "'s 600 minutes"
    sentence = f"It trained 1.4 times as long as the plain student, without the teacher{own}: longer=1.4 compares"
    assert (sentence in said) == advised
    assert ("longer=" in said) == advised
    assert "longer=" not in verdict(study, tabulate(study, results, {}))["sentence"]


def test_every_group_has_its_longer_student() -> None:
    groups = with_longer(read_study("table1").groups, 2)
    assert len(groups) == 3
    for group in groups:
        names = [row.name for row in group.rows]
        assert names.index("plain, 2 times as long") == names.index("student") + 1


def test_there_is_no_verdict_before_both_are_trained() -> None:
    study, results = make("verdict", {"teacher": [20.0], "plain": [10.0], "distilled": [None]})
    assert verdict(study, tabulate(study, results, {})) is None
    study, results = make("verdict", {"teacher": [20.0], "plain": [10.0, 11.0], "distilled": [12.0, None]})
    lines = tabulate(study, results, {})
    assert verdict(study, lines) is None
    assert "the same command goes on" in markdown(study, lines)


def test_a_gain_of_nothing_has_no_minus() -> None:
    study, results = make("table7", {"K = 0 (student)": [10.0], "K = 5": [9.96]})
    assert cells(markdown(study, tabulate(study, results, {})))["K = 5"][1] == "+0.0 (+2.7)"


def test_a_table_of_other_settings_is_kept(tmp_path) -> None:
    study, results = make("table7", {"K = 0 (student)": [10.0]})
    lines = tabulate(study, results, {})
    first = write_files(study, lines, tmp_path, results)
    kept = first[0].read_text()
    other = replace(study, settings={**study.settings, "arguments": {"epochs": 9}})
    assert write_files(other, lines, tmp_path, results)[0].name == "table7-2.md"
    assert first[0].read_text() == kept
    more = replace(study, settings={**study.settings, "seeds": (0, 1, 2, 3)})
    assert write_files(more, lines, tmp_path, results) == first
    (tmp_path / "table7.json").write_text("[")  # half a file of somebody else's
    assert write_files(study, lines, tmp_path, results)[0].name == "table7-3.md"


def test_files_hold_the_numbers_of_the_table(tmp_path) -> None:
    study, results = make("verdict", {"teacher": [20.0], "plain": [10.0, 12.0, 14.0], "distilled": [13.0, 15.0, 17.1]})
    lines = tabulate(study, results, {})
    files = write_files(study, lines, tmp_path, results)
    assert [file.name for file in files] == ["verdict.md", "verdict.csv", "verdict.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["verdict.csv", "verdict.json", "verdict.md"]
    assert "**Distillation helped" in files[0].read_text()
    with files[1].open(newline="") as stream:
        table = {(row["row"], row["column"]): row for row in csv.DictReader(stream)}
    assert len(table) == 3 * len(COLUMNS)
    row = table["distilled", "mAP"]
    gain = lines[-1].cells["mAP"].gain
    assert float(row["mean"]) == pytest.approx(45.1 / 3, abs=1e-4)
    assert (float(row["gain_low"]), float(row["gain_high"])) == pytest.approx((gain.low, gain.high), abs=1e-4)
    assert (row["seeds"], row["paper"], table["plain", "mAP"]["gain"]) == ("3", "", "")
    saved = json.loads(Path(files[2]).read_text())
    assert saved["verdict"]["verdict"] == "helped"
    runs = saved["rows"][2]["runs"]
    assert [runs[str(seed)]["results"]["mAP"] for seed in range(3)] == [13.0, 15.0, 17.1]


def test_a_split_without_objects_is_no_unfinished_study() -> None:
    # pycocotools gives -1 where there is nothing to measure
    study, results = make("verdict", {"teacher": [-1.0], "plain": [-1.0], "distilled": [-1.0]})
    lines = tabulate(study, results, {})
    text = markdown(study, lines)
    assert "Not all runs are done" not in text
    assert "mAP: val has no objects to measure that on." in text
    assert cells(text)["plain"][-2] == "1"
    assert verdict(study, lines)["sentence"].startswith("Undecided: val has no objects to measure mAP on")
