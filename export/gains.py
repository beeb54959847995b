"""What distillation and lower precision won, as numbers and as a sentence; and when the clock is not to be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gid_yolo.export.rows import Row, Setting, settings_of, short, signed

SAME_LATENCY = 5.0  # percent between two medians that are called the same


@dataclass(frozen=True)
class Finding:
    """One number that a comparison came to.

    Attributes:
        figures: The numbers, each with what it counts: what a reader sees first.
        sentence: The same as a part of a sentence.
    """

    figures: tuple[tuple[str, str], ...]
    sentence: str


def findings(rows: Sequence[Row], comparable: bool | None = None) -> list[Finding]:
    """Each comparison that the rows allow, of rows that passed, each in one setting: the first that allows any.

    Args:
        rows: All rows.
        comparable: False where model and baseline were trained too differently for a gain to be the teacher's.
    """
    setting, found = _first_compared(rows, comparable)
    return found + _of_precisions(rows, setting)


def gains(rows: Sequence[Row], comparable: bool | None = None) -> str | None:
    """`findings` as one sentence; None where nothing can be compared."""
    sentence = "; ".join(finding.sentence for finding in findings(rows, comparable))
    place = compared_setting(rows, comparable)
    return f"{place}: {sentence}" if place else sentence or None


def compared_setting(rows: Sequence[Row], comparable: bool | None = None) -> Setting | None:
    """The setting in which models are compared; None where all rows share one, or nothing is compared."""
    return _first_compared(rows, comparable)[0] if len(settings_of(rows)) > 1 else None


def _first_compared(rows: Sequence[Row], comparable: bool | None) -> tuple[Setting | None, list[Finding]]:
    passed = [row for row in rows if row.ap is not None and row.per_image]
    for setting in settings_of(passed):
        roles = {row.role: row for row in passed if row.setting == setting}
        if found := _of_setting(roles, comparable):
            return setting, found
    return None, []


def _of_setting(passed: dict[str, Row], comparable: bool | None) -> list[Finding]:
    if "model" not in passed:
        return []
    model, found = passed["model"], []
    if (plain := passed.get("baseline")) and comparable is not False:
        gain = signed(_ap(model) - _ap(plain))
        slower = 100 * (_ms(model) / _ms(plain) - 1)
        close, one = abs(slower) <= SAME_LATENCY, _one_network(model, plain)  # whose difference is noise
        place = "at the same latency" if close or one else f"at {signed(slower)} % latency"
        measured = f" ({signed(slower)} %)" if close else f" (one network, {signed(slower)} % apart)" * one
        interval = model.gain_interval
        elsewhere = f" ({interval} on other images)" if interval else ""
        sentence = f"{model.label} vs {plain.label}: {gain} mAP{elsewhere} {place}{measured}"
        found.append(Finding(((f"{gain} mAP", f"{model.label} over {plain.label}, {place}{elsewhere}"),), sentence))
    if (teacher := passed.get("teacher")) and teacher.ap:
        share, speed = f"{100 * _ap(model) / teacher.ap:.0f} %", f"{_ms(teacher) / _ms(model):.1f} x"
        sentence = f"{model.label} keeps {share} of the teacher's mAP at {speed} its speed"
        found.append(Finding(((share, "of the teacher's mAP"), (speed, "the teacher's speed")), sentence))
    return found


def _of_precisions(rows: Sequence[Row], setting: Setting | None) -> list[Finding]:
    """The model in each lower precision against its fp32 file: where models are compared, else where there is one."""
    models = [row for row in rows if row.role == "model" and row.ap is not None and row.per_image]
    exact = {row.setting[1:]: row for row in models if row.precision == "fp32"}
    home = setting[1:] if setting else None
    several = len({row.setting[1:] for row in rows}) > 1
    found = []
    for precision in dict.fromkeys(row.precision for row in models if row.precision != "fp32"):
        pairs = [(r, exact[r.setting[1:]]) for r in models if r.precision == precision and r.setting[1:] in exact]
        if not pairs:
            continue
        row, twin = next((pair for pair in pairs if pair[0].setting[1:] == home), pairs[0])
        elsewhere = several and row.setting[1:] != home
        what = f"{row.label} {precision} vs fp32"
        what += f" ({short(row.provider)}, batch {row.batch}, {row.size})" if elsewhere else ""
        lost, speed = signed(_ap(row) - _ap(twin)), f"{_ms(twin) / _ms(row):.1f} x"
        found.append(Finding(((speed, f"{what}, {lost} mAP"),), f"{what}: {lost} mAP at {speed} its speed"))
    return found


def noise_note(rows: Sequence[Row]) -> str | None:
    """A footnote where one network, measured twice, came out at two latencies: the machine was busy."""
    worst: tuple[float, Row, Row] | None = None
    for setting in settings_of(rows):
        twins = [row for row in rows if row.setting == setting and row.role in {"model", "baseline"} and row.per_image]
        if len(twins) < 2 or not _one_network(*twins):
            continue
        apart = 100 * (_ms(twins[0]) / _ms(twins[1]) - 1)
        if worst is None or abs(apart) > abs(worst[0]):
            worst = apart, twins[0], twins[1]
    if worst is None or abs(worst[0]) <= SAME_LATENCY:
        return None
    apart, one, other = worst
    place = f" ({one.setting})" if len(settings_of(rows)) > 1 else ""
    return (
        f"WARNING: NOISY LATENCY: {one.label} and {other.label} are the same network, so that the "
        f"{signed(apart)} % between them{place} is the noise of this machine: leave it idle, or ask for more rounds."
    )


def _one_network(one: Row, other: Row) -> bool:
    """True of two rows whose networks are the same but for the weights; of a file alone nothing says it."""
    kinds = {(row.name, row.backbone, row.parameters, row.gflops) for row in (one, other)}
    return len(kinds) == 1 and one.parameters is not None


def _ap(row: Row) -> float:
    assert row.ap is not None
    return row.ap


def _ms(row: Row) -> float:
    assert row.per_image is not None
    return row.per_image
