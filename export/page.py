"""A benchmark as one HTML file that needs nothing else: no network, no library, one small script."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from gid_yolo.export.chart import left_out
from gid_yolo.export.drawing import draw, shape
from gid_yolo.export.examples import LEAST, MATCH_IOU, SHOWN, figures, slots_of
from gid_yolo.export.gains import SAME_LATENCY, findings
from gid_yolo.export.html_table import html_table
from gid_yolo.export.points import colours, points, shapes
from gid_yolo.export.report import BenchmarkReport, contents
from gid_yolo.export.rows import Row, short
from gid_yolo.files import replaced


def write_html(report: BenchmarkReport, path: Path) -> None:
    """Summary, picture, table, examples and settings, as one file."""
    page = render(report)
    with replaced(path) as part:
        part.write_text(page, encoding="utf-8")


def render(report: BenchmarkReport) -> str:
    """The page. What is put into the template is escaped here, where it becomes HTML, and nowhere else."""
    template = resources.files("gid_yolo.export").joinpath("page.html").read_text(encoding="utf-8")
    script = template[template.index("<script>") + len("<script>") : template.index("</script>")]
    stored = contents(report)
    first = report.rows[0].title if report.rows else "Benchmark"
    values = {
        # Only this script may run, whatever a name in the data may hold
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "title": escape(first),
        "summary": escape(str(report.settings.get("summary", ""))),
        "badge": _badge(report.comparable),
        "findings": _findings(report),
        "gains": f'<p class="gains">{escape(stored["gains"])}</p>' if stored["gains"] else "",
        "notes": "".join(_note(note) for note in report.notes),
        "facets": _facets(report.rows),
        "plot": _plot(report.rows),
        "table": html_table(report.rows, _marks(report.rows)),
        "examples": _examples(report),
        "settings": _tree(report.settings),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template)


def _badge(comparable: bool | None) -> str:
    if comparable is None:
        return ""
    words = "equal training budgets" if comparable else "not comparable: unequal training"
    return f'<span class="badge {"good" if comparable else "bad"}">{words}</span>'


def _findings(report: BenchmarkReport) -> str:
    found = [figure for finding in findings(report.rows, report.comparable) for figure in finding.figures]
    if not found:
        return ""
    cards = (f"<li><b>{escape(value)}</b><span>{escape(what)}</span></li>" for value, what in found)
    return f'<ul class="cards">{"".join(cards)}</ul>'


def _note(note: str) -> str:
    kind, _, words = note.partition(": ")
    if kind not in {"WARNING", "note"}:
        kind, words = "note", note
    name = "warning" if kind == "WARNING" else "note"
    return f'<li class="{name}"><b>{name}</b><span>{escape(words)}</span></li>'


def _facet_values(rows: Sequence[Row]) -> dict[str, list[tuple[Any, str]]]:
    """What rows differ in, each value with its words."""
    models = {(row.role, row.label): row.title for row in rows}
    letters = shapes(rows)
    sizes = {(row.batch, row.height, row.width): f"{row.size}, batch {row.batch}" for row in rows}
    return {
        "model": list(models.items()),
        "precision": [(name, name) for name in dict.fromkeys(row.precision for row in rows)],
        "provider": [(name, short(name)) for name in dict.fromkeys(row.provider for row in rows)],
        "shape": [(key, f"{letters[key]}  {words}" if key in letters else words) for key, words in sizes.items()],
    }


def _marks(rows: Sequence[Row]) -> dict[int, str]:
    """For each row the attributes that its line and its point share: its number, and which value of each facet."""
    values = {name: [value for value, _ in pairs] for name, pairs in _facet_values(rows).items()}
    found = {}
    for i, row in enumerate(rows):
        own = {
            "model": (row.role, row.label),
            "precision": row.precision,
            "provider": row.provider,
            "shape": (row.batch, row.height, row.width),
        }
        facets = " ".join(f'data-{name}="{values[name].index(own[name])}"' for name in values)
        found[i] = f'data-row="{i}" {facets}'
    return found


def _facets(rows: Sequence[Row]) -> str:
    """The legend, whose entries can be switched off."""
    names, parts = colours(rows), []
    for facet, pairs in _facet_values(rows).items():
        if not pairs or (len(pairs) < 2 and facet != "model"):
            continue
        chips = []
        for i, (value, words) in enumerate(pairs):
            mark = ""
            if facet in {"model", "precision"}:
                colour = f"c-{names[value]}" if facet == "model" else "c-plain"
                drawn = shape("fp32" if facet == "model" else value)
                mark = f'<svg class="swatch {colour}" viewBox="-10 -10 20 20" aria-hidden="true">{drawn}</svg>'
            elif facet == "provider":
                line = f'<path class="front front{i % 3}" d="M-14 0H14"/>'
                hollow = " hollow" * (i % 2)
                mark = (
                    f'<svg class="swatch wide c-plain{hollow}" viewBox="-14 -10 28 20" aria-hidden="true">{line}'
                    f'<g class="point">{shape("fp32")}</g></svg>'
                )
            box = f'<input type="checkbox" data-facet="{facet}" value="{i}" checked>'
            chips.append(f"<label>{box}{mark}<span>{escape(words)}</span></label>")
        name = "batch and size" if facet == "shape" else facet
        parts.append(f"<fieldset><legend>{name}</legend>{''.join(chips)}</fieldset>")
    return "".join(parts)


def _plot(rows: Sequence[Row]) -> str:
    marks = _marks(rows)
    failed = f"<p>{escape(left_out(tuple(rows)))}</p>" if any(row.failed for row in rows) else ""
    if not points(rows):
        return f'<p class="empty">There is no measurement to draw.</p>{failed}'
    drawn = f'<div class="for-wide">{draw(rows, marks, 960, 460)}</div>'
    drawn += f'<div class="for-narrow">{draw(rows, marks, 370, 400)}</div>'
    front = (
        "The steps join what no other row of its provider beats (the Pareto front); latencies within "
        f"{SAME_LATENCY:g} % count as one. They are of all rows, also where some are hidden."
    )
    return f"{drawn}<p>{front}</p>{failed}"


def _examples(report: BenchmarkReport) -> str:
    if not report.examples:
        return ""
    slots = slots_of(report.examples)
    names: dict[int, str] = {}
    for example in report.examples:
        names |= {c: str(example.names.get(c, c)) for c in slots}
    legend = "".join(
        f'<li><svg class="swatch" viewBox="-10 -10 20 20" aria-hidden="true"><rect class="box k{slot}" x="-7" y="-7" '
        f'width="14" height="14"/></svg>{escape(names[c])}</li>'
        for c, slot in slots.items()
    )
    kinds = "".join(
        f'<li><svg class="swatch" viewBox="-10 -10 20 20" aria-hidden="true"><rect class="{kind}" x="-7" y="-7" '
        f'width="14" height="14"/></svg>{words}</li>'
        for kind, words in (
            ("box hit k", f"finds an object (its class, IoU of at least {MATCH_IOU})"),
            ("box false k", "finds none"),
            ("missed", "an object that was missed"),
        )
    )
    body = "".join(figures(example, i, slots) for i, example in enumerate(report.examples))
    return (
        '<section id="examples"><h2>Examples</h2><p>The same images for every model, as the first of its files in the '
        "table sees them on the CPU.</p>"
        '<div class="controls"><label class="slider">score of at least '
        f'<input type="range" id="score" min="{LEAST}" max="0.9" step="0.05" value="{SHOWN}">'
        f'<output for="score">{SHOWN:.2f}</output></label>'
        f'<ul class="legend">{legend}</ul><ul class="legend">{kinds}</ul></div>{body}</section>'
    )


def _tree(value: Any) -> str:
    """Nested settings as nested lists of terms."""
    if isinstance(value, Mapping):
        parts = (f"<dt>{escape(str(key))}</dt><dd>{_tree(item)}</dd>" for key, item in value.items())
        return f"<dl>{''.join(parts)}</dl>" if value else "–"
    if isinstance(value, list | tuple):
        return escape(", ".join(map(str, value))) or "–"
    return escape("–" if value is None else str(value))
