"""The picture of a study, from runs whose curves are made up here."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from gid_yolo.analysis import study_plot
from gid_yolo.analysis.study_file import read_study
from gid_yolo.analysis.study_plan import Row, Run, Study


def write_curve(home: Path, *points: tuple[int, float, float]) -> None:
    home.mkdir(parents=True)
    lines = ["epoch,time,metrics/mAP50-95(B)", *(f"{epoch},{time},{value}" for epoch, time, value in points)]
    (home / "results.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture
def study(tmp_path) -> Study:
    """Two groups of a teacher trained elsewhere, a plain student of two seeds, a distilled one that has not begun."""
    write_curve(tmp_path / "elsewhere", (1, 9.0, 0.3), (2, 18.0, 0.5), (3, 27.0, 0.4))
    best = tmp_path / "elsewhere" / "weights" / "best.pt"
    rows = []
    for group in ("RetinaNet", "FCOS"):
        for seed in (0, 1):
            write_curve(tmp_path / "runs" / f"{group}-plain-{seed}", (1, 2.0, 0.1), (2, 4.0, 0.2 + seed / 10))
        rows.append(Row(group, "teacher", "teacher", {0: Run(f"{group}-t", {}, best)}, {}))
        rows.append(Row(group, "plain", "plain", {n: Run(f"{group}-plain-{n}", {}) for n in (0, 1)}, {}))
        rows.append(Row(group, "distilled", "distilled", {0: Run(f"{group}-d", {})}, {}))
    return Study(read_study("table1"), tuple(rows), {})


def test_every_curve_that_was_logged_is_drawn(study, tmp_path, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(study_plot, "plot_curves", lambda *given: drawn.append(given))
    picture = tmp_path / "table1.png"
    assert study_plot.draw_study(study, tmp_path / "runs", picture)
    plain = [[(1, 2.0, 10.0), (2, 4.0, 20.0)], [(1, 2.0, 10.0), (2, 4.0, 30.0)]]
    groups = {group: {"plain": plain, "distilled": []} for group in ("RetinaNet", "FCOS")}
    assert drawn == [(groups, picture, {"RetinaNet": 50.0, "FCOS": 50.0})]  # its best epoch


def test_a_teacher_that_was_moved_has_no_curve(study, tmp_path, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(study_plot, "plot_curves", lambda *given: drawn.append(given))
    moved = tmp_path / "elsewhere" / "models" / "best.pt"  # beside another run's results.csv
    rows = tuple(replace(row, runs={0: Run("t", {}, moved)}) if row.kind == "teacher" else row for row in study.rows)
    assert study_plot.draw_study(replace(study, rows=rows), tmp_path / "runs", tmp_path / "table1.png")
    assert drawn[0][2] == {}


def test_the_picture_has_a_pair_of_axes_for_each_group(study, tmp_path) -> None:
    sizes = []
    for rows in (study.rows[:3], study.rows):
        picture = tmp_path / "table1.png"
        assert study_plot.draw_study(replace(study, rows=rows), tmp_path / "runs", picture)
        with Image.open(picture) as image:
            sizes.append(image.size)
    assert sizes[0][0] == sizes[1][0]
    assert sizes[1][1] == 2 * sizes[0][1]
    assert [path.name for path in tmp_path.glob("*.png*")] == ["table1.png"]  # and nothing half


def test_nothing_is_drawn_of_nothing(study, tmp_path) -> None:
    (tmp_path / "runs" / "RetinaNet-plain-1" / "results.csv").write_text("epoch,time\n1,2\n")  # damaged
    assert study_plot.draw_study(study, tmp_path / "runs", tmp_path / "some.png")
    assert not study_plot.draw_study(study, tmp_path / "nowhere", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
