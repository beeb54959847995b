import csv
import json
from dataclasses import fields, replace

import pytest
from report_helpers import CUDA, make_matrix, make_row

from gid_yolo.engine.coco_eval import COLUMNS
from gid_yolo.export.budget import budget_notes, comparable
from gid_yolo.export.gains import gains, noise_note
from gid_yolo.export.intervals import few_images_notes
from gid_yolo.export.report import (
    BenchmarkReport,
    conditions,
    table,
    write_csv,
    write_json,
    write_markdown,
)
from gid_yolo.export.rows import Row

RECORD = {
    **{"data": "a.yaml", "fraction": 1.0, "epochs": 40, "imgsz": 320, "batch": 8, "seed": 0},
    **{"initialised_from": "random", "teacher": None, "distill": "gid"},
}
DISTILLED = {**RECORD, "teacher": "teacher.pt"}


def cells(rows: list[Row]) -> list[dict[str, str]]:
    """The table's lines as dictionaries by its head."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(rows).splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_gains_say_what_distillation_won():
    rows = [make_row("model", 33.0, 10.0), make_row("baseline", 30.0, 10.1), make_row("teacher", 44.0, 41.0)]
    assert gains(rows) == (
        "distilled vs plain: +3.0 mAP at the same latency (-1.0 %); "
        "distilled keeps 75 % of the teacher's mAP at 4.1 x its speed"
    )


def test_gains_say_how_certain_they_are():
    rows = [make_row("model", 33.0, gain_low=1.26, gain_high=4.0, gain_certain=True), make_row("baseline", 30.0)]
    assert gains(rows) == "distilled vs plain: +3.0 mAP (+1.3 to +4.0 on other images) at the same latency (+0.0 %)"
    assert few_images_notes(rows) == []
    undecided = {"gain_low": -0.5, "gain_high": 4.0, "gain_certain": False}
    rows[0] = make_row("model", 33.0, **undecided)
    assert few_images_notes(rows) == [
        "WARNING: UNDECIDED: on other images distilled would be -0.5 to +4.0 mAP ahead of its baseline: the split has "
        "too few to tell, measure on more."
    ]
    rows += [make_row("model", 33.0, precision="int8", **undecided), make_row("model", 33.0, batch=8, **undecided)]
    notes = few_images_notes(rows)
    assert ["int8, CPU, batch 1, 256x320" in note for note in notes] == [False, True, False]
    failed = make_row("model", failed="boxes differ", **undecided)
    assert (failed.gain_interval, failed.record()["gain_low"], failed.record()["gain_certain"]) == ("", None, None)
    same = make_row("model", 33.0, gain_low=0.0, gain_high=0.0, gain_certain=False)  # the same weights
    assert few_images_notes([failed, same]) == []


def test_gains_do_not_call_another_latency_the_same():
    sentence = gains([make_row("model", 29.0, 12.0, gflops=9.0), make_row("baseline", 30.0, 10.0)])
    assert sentence == "distilled vs plain: -1.0 mAP at +20.0 % latency"


def test_one_network_has_one_latency():
    sentence = gains([make_row("model", 31.0, 11.2), make_row("baseline", 30.0, 10.0)])
    assert sentence == "distilled vs plain: +1.0 mAP at the same latency (one network, +12.0 % apart)"


def test_gains_have_no_negative_zero():
    assert gains([make_row("model", 29.99), make_row("baseline", 30.0)]) == (
        "distilled vs plain: +0.0 mAP at the same latency (+0.0 %)"
    )


@pytest.mark.parametrize(
    "rows",
    [
        [make_row("model")],
        [make_row("model"), make_row("baseline", failed="boxes differ")],
        [make_row("model", failed="boxes differ"), make_row("baseline"), make_row("teacher")],
        [make_row("model", ap=-1.0), make_row("baseline")],
        [make_row("model", ap=0.0), make_row("teacher", ap=0.0)],
    ],
)
def test_gains_count_only_rows_with_results(rows):
    assert gains(rows) is None


def test_one_network_at_two_latencies_is_noise():
    note = noise_note([make_row("model", p50=11.0), make_row("baseline", p50=10.0), make_row("teacher", p50=50.0)])
    assert note is not None
    assert "the +10.0 % between them is the noise of this machine" in note
    assert noise_note([make_row("model", p50=10.2), make_row("baseline", p50=10.0)]) is None
    assert noise_note([replace(make_row("model", p50=20.0), gflops=3.0), make_row("baseline")]) is None
    assert noise_note([make_row("model", failed="x"), make_row("baseline")]) is None


def test_one_setting_is_compared_and_named():
    big = {"height": 320, "width": 416}
    rows = [
        make_row("model", failed="x"),  # the first setting allows nothing
        make_row("model", 40.0, 20.0, **big),
        make_row("baseline", 35.0, 10.0),
        make_row("baseline", 38.0, 20.0, **big),
        make_row("teacher", 80.0, 10.0),
    ]
    assert gains(rows) == "fp32, CPU, batch 1, 320x416: distilled vs plain: +2.0 mAP at the same latency (+0.0 %)"


def test_lower_precisions_are_compared_with_their_own_fp32():
    assert gains(make_matrix()) == (
        "fp32, CPU, batch 1, 256x320: distilled vs plain: +10.0 mAP at the same latency (-1.0 %); "
        "distilled keeps 80 % of the teacher's mAP at 4.0 x its speed; "
        "distilled fp16 vs fp32: +0.0 mAP at 0.9 x its speed; distilled int8 vs fp32: -0.5 mAP at 2.0 x its speed"
    )
    rows = [
        make_row("model", 40.0, 10.0),
        make_row("model", 40.0, 3.0, provider=CUDA),
        make_row("model", 39.0, 1.0, provider=CUDA, precision="fp16"),
        make_row("model", 38.0, 1.0, precision="int8", batch=2),  # has no fp32 to compare with
    ]
    assert gains(rows) == "distilled fp16 vs fp32 (CUDA, batch 1, 256x320): -1.0 mAP at 3.0 x its speed"


def test_larger_batches_are_compared_by_the_image():
    rows = [make_row("model", batch=8, p50=80.0), make_row("model", batch=8, p50=40.0, precision="int8")]
    assert rows[0].per_image == 10.0
    assert gains(rows) == "distilled int8 vs fp32: +0.0 mAP at 2.0 x its speed"


def test_unequal_budgets_take_the_gain_out_of_the_sentence():
    rows = [make_row("model", 33.0), make_row("baseline"), make_row("teacher", 44.0, 40.0)]
    assert gains(rows, comparable=False) == "distilled keeps 75 % of the teacher's mAP at 4.0 x its speed"
    assert gains(rows, comparable=True) == gains(rows)
    assert " vs " not in str(BenchmarkReport(tuple(rows), comparable=False))


def test_noise_is_looked_for_in_every_setting():
    rows = [make_row("model"), make_row("baseline")]
    rows += [make_row("model", p50=6.0, precision="int8"), make_row("baseline", p50=5.0, precision="int8")]
    assert "+20.0 % between them (int8, CPU, batch 1, 256x320) is the noise" in (noise_note(rows) or "")
    assert noise_note([replace(row, parameters=None) for row in rows]) is None  # nothing says they are one network
    assert noise_note([make_row("model", p50=20.0), make_row("baseline", precision="int8")]) is None


def test_table_is_aligned_and_hides_what_was_not_measured():
    rows = [make_row("model"), make_row("baseline", failed="boxes differ")]
    assert len({len(line) for line in table(rows).splitlines()}) == 1
    good, bad = cells(rows)
    assert (good["model"], good["p50 ms"], good["AP_S"], good["parity"]) == (
        "distilled retina_nano",
        "10.00",
        "-",
        "ok",
    )
    assert bad["parity"] == "FAILED"
    assert {bad[name] for name in ("p50 ms", "p95 ms", "img/s", "mAP", "AP50", "AP75", "AP_M", "AP_L")} == {"-"}
    assert not {"precision", "provider", "batch", "size", "mAP lost", "RAM MB", "e2e img/s"} & set(good)


def test_table_shows_the_settings_that_differ():
    found = cells(make_matrix())
    assert (found[5]["precision"], found[5]["size"], found[5]["mAP lost"]) == ("int8", "320x416", "+0.5")
    assert found[1]["mAP lost"] == "+0.0"  # -0.0
    assert not {"provider", "batch", "backbone"} & set(found[0])
    assert found[0]["e2e img/s"] == "87.0"  # 1000 / (1 + 10 + 0.5)
    assert found[11]["parity"] == "FAILED"
    assert {found[11][name] for name in ("p50 ms", "mAP", "mAP lost", "RAM MB", "e2e img/s")} == {"-"}
    assert conditions(make_matrix()) == "ONNX fp32/fp16/int8 256x320/320x416, batch 1; CPUExecutionProvider"
    assert cells([make_row("model"), make_row("model", provider=CUDA, batch=4)])[1]["provider"] == "CUDA"


def test_table_of_nothing_and_of_a_foreign_file():
    assert table([]) == "no rows"
    assert str(BenchmarkReport(())) == "no rows"
    foreign = Row(role="other", label="yolo", name="", backbone="", height=64, width=64, file_size=1.0, p50=2.0)
    (found,) = cells([foreign])
    assert (found["model"], found["mAP"], found["p50 ms"]) == ("yolo", "-", "2.00")
    assert not {"params M", "GFLOPs", "backbone"} & set(found)
    assert conditions([foreign]) == "ONNX fp32 64x64, batch 1; CPUExecutionProvider"


def test_no_number_is_a_negative_zero():
    (found,) = cells([make_row("model", ap=-0.0, p50=1.0, ap_drop=-0.001)])
    assert (found["mAP"], found["mAP lost"]) == ("0.0", "+0.0")


def test_a_row_that_was_not_compared_is_not_ok():
    found = cells([replace(make_row("model"), compared=False), make_row("baseline")])
    assert [line["parity"] for line in found] == ["not compared", "ok"]


def test_a_row_is_there_once():
    with pytest.raises(ValueError, match="two rows are model distilled in fp32, CPU, batch 1, 256x320"):
        BenchmarkReport((make_row("model"), make_row("model", 20.0)))


def test_files_hold_the_rows(tmp_path):
    rows = (replace(make_row("model"), compared=False), make_row("baseline", failed="boxes differ"))
    report = BenchmarkReport(rows, {"summary": "head", "threads": 1}, ("WARNING: one", "note: two"), tmp_path)
    for write, name in ((write_json, "a.json"), (write_csv, "a.csv"), (write_markdown, "a.md")):
        write(report, tmp_path / name)
    stored = json.loads((tmp_path / "a.json").read_text())
    assert stored["settings"]["threads"] == 1
    own = [field.name for field in fields(Row)]
    assert [Row(**{name: row[name] for name in own}) for row in stored["rows"]] == list(rows)
    with (tmp_path / "a.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    for line, row in zip(lines, rows, strict=True):
        assert line == {key: "" if value is None else str(value) for key, value in row.flat().items()}
    assert (tmp_path / "a.md").read_text().endswith("WARNING: one\n\nnote: two\n")
    assert not list(tmp_path.glob(".*"))


def test_what_follows_from_the_numbers_has_a_name_too():
    row = make_row("model", batch=4, p50=30.0, preprocess=6.0, postprocess=4.0, images_per_second=100.0)
    found = row.flat()
    assert found["per_image"] == 7.5
    assert found["end_to_end"] == 80.0  # 4 images in 6 + 40 + 4 ms: the network's mean, as its images per second are
    assert set(COLUMNS) | {"memory", "ap_drop", "p99", "parity", "height", "provider"} <= set(found)
    assert replace(row, preprocess=None).end_to_end is None


def test_a_failed_row_has_no_results_in_any_file():
    row = replace(make_row("model", preprocess=1.0, postprocess=1.0, memory=3.0), failed="mAP fell", ap_drop=9.0)
    found = row.flat()
    results = {"p50", "p95", "p99", "preprocess", "postprocess", "images_per_second", "memory", *COLUMNS}
    assert {found[name] for name in results | {"per_image", "end_to_end"}} == {None}
    assert (found["ap_drop"], found["failed"]) == (9.0, "mAP fell")  # why it failed


def test_json_is_standard_json(tmp_path):
    row = make_row("model", failed="boxes differ", box_difference=float("inf"), score_difference=float("nan"))
    write_json(BenchmarkReport((row,)), tmp_path / "a.json")

    def refuse(name):
        raise ValueError(name)

    (stored,) = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)["rows"]
    assert (stored["box_difference"], stored["score_difference"]) == ("inf", "nan")


def test_files_of_no_rows(tmp_path):
    for write in (write_json, write_csv, write_markdown):
        write(BenchmarkReport(()), tmp_path / "a")
        assert (tmp_path / "a").is_file()


def test_equal_budgets_need_no_note():
    assert budget_notes(DISTILLED, RECORD) == []


def test_unequal_budgets_are_told_with_both_values():
    assert budget_notes({**DISTILLED, "epochs": 80, "seed": 1}, RECORD) == [
        "WARNING: UNEQUAL BUDGET: epochs is 80 for model, but 40 for baseline.",
        "note: seed is 1 for model, but 0 for baseline.",
    ]


def test_budget_without_a_record_is_unknown():
    assert budget_notes(DISTILLED, {}) == [
        "WARNING: EQUAL BUDGET UNKNOWN: the checkpoint of baseline does not say how it was trained."
    ]
    old = {key: value for key, value in RECORD.items() if key != "imgsz"}
    assert budget_notes(DISTILLED, old) == [
        "WARNING: UNEQUAL BUDGET: imgsz is 320 for model, but unknown for baseline."
    ]


def test_what_is_comparable():
    assert comparable(DISTILLED, RECORD)
    assert comparable({**DISTILLED, "seed": 1}, RECORD)  # told, but not decisive
    for key, value in (("data", "b.yaml"), ("epochs", 80), ("imgsz", 640), ("initialised_from", "imagenet.pt")):
        assert not comparable({**DISTILLED, key: value}, RECORD)
    assert not comparable(DISTILLED, {})
    assert not comparable(RECORD, RECORD)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("network", "1 parameters (a)"),
        ("optimizer", "SGD"),
        ("lr0", 0.1),
        ("lr_gamma", 0.5),
        ("mosaic", 1.0),
        ("epochs_done", 12),
    ],
)
def test_what_decides_where_both_say_it(key, value):
    other = {"network": "1 parameters (b)", "optimizer": "AdamW", "lr0": 0.01, "lr_gamma": 0.1, "mosaic": 0.0}
    other["epochs_done"] = 40
    assert comparable(DISTILLED | other, RECORD | other)
    assert not comparable(DISTILLED | other | {key: value}, RECORD | other)
    assert comparable(DISTILLED | {key: value}, RECORD | {"epochs_done": value} if key == "epochs_done" else RECORD)


def test_data_are_compared_by_what_they_hold():
    moved = {"data": "b.yaml", "train_images": "0123"}
    assert comparable(DISTILLED | moved, RECORD | {"train_images": "0123"})
    assert not comparable(DISTILLED | {"train_images": "0124"}, RECORD | {"train_images": "0123"})  # under one name
    turned = {"train_images": "3210", "train_contents": "abcd"}  # in another order
    assert comparable(DISTILLED | moved | turned, RECORD | {"train_images": "0123", "train_contents": "abcd"})
    assert not comparable(DISTILLED | moved | turned, RECORD | {"train_images": "0123"})  # of an older version
    assert not comparable(DISTILLED | moved, RECORD)  # and of one before


def test_runs_that_ended_early_are_told():
    stopped = {"epochs_done": 31}
    assert budget_notes(DISTILLED | stopped, RECORD | stopped) == [
        "note: model ended after 31 of 40 epochs.",
        "note: baseline ended after 31 of 40 epochs.",
    ]
    assert "WARNING: UNEQUAL BUDGET: epochs_done is 31 for model, but 40 for baseline." in budget_notes(
        DISTILLED | stopped, RECORD | {"epochs_done": 40}
    )


def test_one_file_given_twice_is_noticed():
    same = {"weights": "0123"}
    assert budget_notes(DISTILLED | same, RECORD | same) == [
        "WARNING: model and baseline have the same weights: one of the two is the wrong file."
    ]


def test_exchanged_checkpoints_are_noticed():
    assert budget_notes(RECORD, DISTILLED) == [
        "WARNING: model was not distilled: its record names no teacher.",
        "WARNING: baseline is not plain: it was distilled from teacher.pt.",
    ]
