r"""Tables and curves of `benchmarks/results/accuracy.jsonl`: what distillation gains at an equal budget, how long.

    python benchmarks/accuracy/report.py --split test
    python benchmarks/accuracy/report.py --data synthetic-v1 --models "retina_nano under teacher_retina" --epochs 240 \
        --rows plain "paper, until half" --curves docs/accuracy.png

For each data set and pair of models: mAP of every row at every schedule, mean ± standard deviation over seeds, and its
gain over the plain student of the same schedule, paired by seed, with the 95 % interval. A row is a method with all of
its arguments; rows that were tried once stand there too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from train import RESULTS

from gid_yolo.analysis.statistics import Gain, paired_gain, spread
from gid_yolo.analysis.study_plot import plot_curves as draw
from gid_yolo.export.report import align

Line = dict[str, Any]
PULLS = ("over_task", "cosine", "share")
KINDS = ("teacher", "plain", "distilled")
EQUAL = 0.97  # of a time that counts as the same: the clock of a shared machine is no better
COLOURS = ("black", "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")


def read(path: Path) -> list[Line]:
    """All lines of a file of results."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_seed(lines: Sequence[Line], row: str, epochs: int | None, split: str) -> dict[int, float]:
    """Results of a row at a schedule: mAP in percent."""
    return {x["seed"]: x[split]["mAP"] for x in lines if x["row"] == row and x["epochs"] == epochs and x.get(split)}


def table(lines: Sequence[Line], split: str, over: str = "plain") -> str:
    """Of one data set and one pair of models; gains are over the row `over`."""
    schedules = sorted({x["epochs"] for x in lines if x["kind"] != "teacher"})
    rows = list(dict.fromkeys(x["row"] for x in sorted(lines, key=lambda x: KINDS.index(x["kind"]))))
    body = []
    for row in rows:
        kind = next(x["kind"] for x in lines if x["row"] == row)
        if kind == "teacher":
            values = by_seed(lines, row, None, split)
            body.append([row, *[f"{mean(values.values()):.1f}" if values else ""] * len(schedules)])
            continue
        cells = []
        for epochs in schedules:
            values, other = by_seed(lines, row, epochs, split), by_seed(lines, over, epochs, split)
            found = spread(list(values.values()))
            text = "" if found is None else f"{found.mean:.1f}"
            text += f" ± {found.std:.1f}" if found and found.std is not None else ""
            gain = paired_gain(values, other) if kind == "distilled" and row != over else None
            if gain:
                text += f", {told(gain)}"
            cells.append(text)
        body.append([row, *cells])
    return align([["", *(f"{epochs} epochs" for epochs in schedules)], *body], [False] * (len(schedules) + 1))


def at_equal_time(lines: Sequence[Line], split: str) -> str:
    """Each distilled row beside the plain student that trained as long by the clock, or longer: the shortest such."""
    lines = [x for x in lines if x.get(split) and x.get("seconds") and x["kind"] != "teacher"]
    groups: dict[tuple[str, int], list[Line]] = defaultdict(list)
    for x in lines:
        groups[x["row"], x["epochs"]].append(x)
    minutes = {key: median(x["seconds"] for x in group) / 60 for key, group in groups.items()}
    body = []
    for (row, epochs), group in groups.items():
        if group[0]["kind"] == "plain":
            continue
        values = by_seed(lines, row, epochs, split)
        plain = {n: by_seed(lines, "plain", n, split) for name, n in groups if name == "plain"}
        common = [n for n in plain if values.keys() & plain[n].keys()]
        as_long = [n for n in common if minutes["plain", n] >= EQUAL * minutes[row, epochs]]
        line = [row, str(epochs), f"{minutes[row, epochs]:.0f}"]
        if not common:
            body.append([*line, "none of its seeds", "", ""])
            continue
        n = min(as_long, key=lambda x: minutes["plain", x]) if as_long else max(common)
        gain = paired_gain(values, plain[n]) if as_long else None
        body.append([*line, str(n), f"{minutes['plain', n]:.0f}", told(gain) if gain else "none so long"])
    head = ["", "epochs", "minutes", "plain epochs", "plain minutes", "gain"]
    return align([head, *body], [False] * len(head))


def told(gain: Gain) -> str:
    """A gain with its interval."""
    return f"{gain.mean:+.1f}" + (f" [{gain.low:+.1f}, {gain.high:+.1f}]" if gain.low is not None else " (1 seed)")


def pulls(lines: Sequence[Line]) -> str:
    """Of one data set and pair: how strongly each term pulls at the student's pyramid, where runs noted it."""
    head = ["", "epochs", "seed", "term", "gradient / task's", "cosine to task's", "share"]
    body = [
        [line["row"], str(line["epochs"]), str(line["seed"]), term, *(f"{found[key]:.3g}" for key in PULLS)]
        for line in lines
        for term, found in line.get("pulls", {}).items()
        if term != "task"
    ]
    return align([head, *body], [False] * len(head))


def plot(lines: Sequence[Line], rows: Sequence[str], split: str, path: Path) -> None:
    """MAP against epochs and against the time that was trained for, of one data set and one pair."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, tight_layout=True)
    for colour, row in zip(COLOURS, rows, strict=False):
        own = [x for x in lines if x["row"] == row and x.get(split)]
        schedules = sorted({x["epochs"] for x in own})
        for axis, place in zip(axes, (lambda x: x["epochs"], lambda x: x["seconds"] / 60), strict=True):
            points = [[x for x in own if x["epochs"] == epochs] for epochs in schedules]
            middle = [median(place(x) for x in group) for group in points]
            axis.plot(middle, [mean(x[split]["mAP"] for x in g) for g in points], "o-", color=colour, label=row)
            axis.scatter([place(x) for x in own], [x[split]["mAP"] for x in own], color=colour, s=8, alpha=0.4)
    for x in lines:
        if x["kind"] == "teacher" and x.get(split):
            for axis in axes:
                axis.axhline(x[split]["mAP"], color="grey", linestyle=":", label="teacher")
    axes[0].set(xlabel="epochs of the schedule", ylabel=f"mAP on {split}", xscale="log")
    axes[1].set(xlabel="minutes of training", xscale="log")
    axes[1].legend()
    figure.savefig(path, dpi=150)


def plot_curves(lines: Sequence[Line], rows: Sequence[str], path: Path) -> None:
    """Validation mAP while runs trained, against epochs and time: each seed's, of the longest schedule of all."""
    common = set.intersection(*({x["epochs"] for x in lines if x["row"] == row and x.get("curve")} for row in rows))
    if not common:
        sys.exit(f"--rows {', '.join(rows)}: there is no schedule of which all have a curve.")
    longest = [x for x in lines if x["epochs"] == max(common) and x.get("curve")]
    curves = {row: [x["curve"] for x in longest if x["row"] == row] for row in rows}
    teachers = [max(value for *_, value in x["curve"]) for x in lines if x["kind"] == "teacher" and x.get("curve")]
    draw({"models": curves}, path, {"models": teachers[0]} if teachers else None)


def titles(groups: Iterable[tuple[str, str]]) -> str:
    """Of pairs of data and models."""
    return ", ".join(f"'{data}' '{models}'" for data, models in groups)


def main() -> None:
    """Print, and draw where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--plot", type=Path, default=None, help="of --data and --models")
    parser.add_argument("--curves", type=Path, default=None, help="likewise, as the runs trained")
    parser.add_argument("--rows", nargs="+", default=["plain", "paper, until half"], help="that are drawn")
    parser.add_argument("--data", default=None, help="only this one")
    parser.add_argument("--models", default=None, help="only these, as the titles name them")
    parser.add_argument("--epochs", type=int, nargs="+", default=None, help="only these schedules")
    parser.add_argument("--over", default="plain", help="the row that gains are over")
    parser.add_argument("--pulls", action="store_true", help="the gradients of the terms instead")
    options = parser.parse_args()
    groups: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in read(options.results):
        if options.epochs and line["epochs"] not in (None, *options.epochs):  # a teacher's line has none
            continue
        if options.data in (None, line["data"]) and options.models in (None, line["models"]):
            groups[line["data"], line["models"]].append(line)
    groups = {key: lines for key, lines in groups.items() if any(x["kind"] != "teacher" for x in lines)}
    if not groups:
        sys.exit(f"{options.results} has no student of these --data, --models and --epochs.")
    if (options.plot or options.curves) and len(groups) > 1:
        sys.exit(f"a picture is of one pair of models on one data set: give --data and --models, of {titles(groups)}.")
    for (data, models), lines in groups.items():
        if options.pulls:
            print(f"\n{data}, {models}, medians over each run\n\n{pulls(lines)}")
            continue
        print(f"\n{data}, {models}, mAP on {options.split}\n\n{table(lines, options.split, options.over)}")
        print(f"\nAt equal time\n\n{at_equal_time(lines, options.split)}")
        if options.plot:
            plot(lines, options.rows, options.split, options.plot)
        if options.curves:
            plot_curves(lines, options.rows, options.curves)


if __name__ == "__main__":
    main()
