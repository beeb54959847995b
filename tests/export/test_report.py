import csv
import json
from dataclasses import replace

import pytest

from gid_yolo.engine.coco_eval import COLUMNS
from gid_yolo.export.budget import budget_notes
from gid_yolo.export.chart import write_png
from gid_yolo.export.report import (
    BenchmarkReport,
    Row,
    gains,
    noise_note,
    replace_file,
    table,
    write_csv,
    write_json,
    write_markdown,
)

RECORD = {
    **{"data": "a.yaml", "fraction": 1.0, "epochs": 40, "imgsz": 320, "batch": 8, "seed": 0},
    **{"initialised_from": "random", "teacher": None, "distill": "gid"},
}
DISTILLED = {**RECORD, "teacher": "teacher.pt"}


def make_row(role: str, ap: float = 30.0, p50: float = 10.0, failed: str | None = None) -> Row:
    label = {"model": "distilled", "baseline": "plain", "teacher": "teacher"}[role]
    fixed = (role, label, "retina_nano", "mobilenetv2_035", 0.62, 1.23, 2.94)
    if failed:
        return Row(*fixed, box_difference=3.0, score_difference=0.0, failed=failed)
    columns = {**dict.fromkeys(COLUMNS, ap), "AP_S": -1.0}
    differences = {"box_difference": 0.001, "score_difference": 1e-6, "ap_difference": 0.0}
    return Row(*fixed, p50, p50 * 1.1, p50 * 1.2, 1e3 / p50, columns, **differences)


def test_gains_say_what_distillation_won():
    rows = [make_row("model", 33.0, 10.0), make_row("baseline", 30.0, 10.1), make_row("teacher", 44.0, 41.0)]
    assert gains(rows) == (
        "distilled vs plain: +3.0 mAP at the same latency (-1.0 %); "
        "distilled keeps 75 % of the teacher's mAP at 4.1 x its speed"
    )


def test_gains_do_not_call_another_latency_the_same():
    sentence = gains([make_row("model", 29.0, 12.0), make_row("baseline", 30.0, 10.0)])
    assert sentence == "distilled vs plain: -1.0 mAP at +20.0 % latency"


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


def test_table_is_aligned_and_hides_what_was_not_measured():
    lines = table([make_row("model"), make_row("baseline", failed="boxes differ")]).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    head, good, bad = cells[0], cells[2], cells[3]
    assert head[0] == "model"
    assert dict(zip(head, good, strict=True))["p50 ms"] == "10.00"
    assert dict(zip(head, good, strict=True))["AP_S"] == "-"
    assert dict(zip(head, good, strict=True))["parity"] == "ok"
    assert bad[-1] == "FAILED"
    assert set(bad[5:-1]) == {"-"}


def test_a_row_that_was_not_compared_is_not_ok():
    lines = table([replace(make_row("model"), compared=False), make_row("baseline")]).splitlines()
    assert [line.strip("| ").split("|")[-1].strip() for line in lines[2:]] == ["not compared", "ok"]


def test_files_hold_the_rows(tmp_path):
    rows = (replace(make_row("model"), compared=False), make_row("baseline", failed="boxes differ"))
    report = BenchmarkReport(rows, {"summary": "head", "threads": 1}, ("WARNING: one", "note: two"), tmp_path)
    for write, name in ((write_json, "a.json"), (write_csv, "a.csv"), (write_markdown, "a.md"), (write_png, "a.png")):
        write(report, tmp_path / name)
    stored = json.loads((tmp_path / "a.json").read_text())
    assert stored["settings"]["threads"] == 1
    assert [Row(**row) for row in stored["rows"]] == list(rows)
    with (tmp_path / "a.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    for line, row in zip(lines, rows, strict=True):
        assert line == {key: "" if value is None else str(value) for key, value in row.flat().items()}
    assert (tmp_path / "a.md").read_text().endswith("WARNING: one\n\nnote: two\n")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("slow", [10.0, 400.0])
@pytest.mark.parametrize("ap", [0.0, 30.0])
def test_picture_of_any_spread(tmp_path, slow, ap):
    rows = (make_row("model", ap), make_row("baseline", 30.0, 10.2), make_row("teacher", 50.0, slow))
    write_png(BenchmarkReport(rows), tmp_path / "a.png")
    write_png(BenchmarkReport((make_row("model", failed="x"),)), tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size > (tmp_path / "b.png").stat().st_size > 1000


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")

    def fail(part):
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "before"


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


def test_exchanged_checkpoints_are_noticed():
    assert budget_notes(RECORD, DISTILLED) == [
        "WARNING: model was not distilled: its record names no teacher.",
        "WARNING: baseline is not plain: it was distilled from teacher.pt.",
    ]
