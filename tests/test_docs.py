"""Links of all pages lead somewhere; docs/paper.md names tests, settings, commands and tolerances that exist."""

import ast
import re
from pathlib import Path

import pytest
from ultralytics.utils import DEFAULT_CFG_DICT

from gid_yolo.engine.config import DEFAULTS

ROOT = Path(__file__).resolve().parents[1]
PAPER = ROOT / "docs" / "paper.md"
TEXT = PAPER.read_text(encoding="utf-8")
CODE = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", TEXT)]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PROMISES = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
PROVEN = set(re.findall(r"`(tests/[^`]+)`", PROMISES))
TESTS = sorted({span for span in CODE if span.startswith("tests/")} | PROVEN)
WORDS = [word for span in CODE for word in span.split()]


def sections() -> dict[str, str]:
    parts = re.split(r"^## (.+)$", TEXT, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> set[str]:
    return {x for x in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if not x.startswith("http")}


def anchors(page: Path) -> set[str]:
    """What the headings of a page are linked by: lower case, without punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", x).lower().replace(" ", "-") for x in headings}


def test_the_page_is_read() -> None:
    assert len(PAGES) > 10
    assert len(links(PAPER)) > 20
    assert len(TESTS) > 40
    assert TEXT.count("`") % 2 == 0


def test_every_promise_has_a_test() -> None:
    rows = [row for row in PROMISES.splitlines() if row.startswith("| ") and not row.startswith("| promise")]
    assert len(rows) > 15
    assert all("`tests/" in row.split("|")[2] for row in rows)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_linked_exists(page: Path) -> None:
    for link in links(page):
        file, _, heading = link.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), link
        assert not heading or heading in anchors(linked), link


@pytest.mark.parametrize("name", TESTS)
def test_a_named_test_exists(name: str) -> None:
    path, _, function = name.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert function in functions if function else any(x.startswith("test_") for x in functions)


@pytest.mark.parametrize("word", sorted({word for word in WORDS if re.match(r"[a-z_]+=", word)}))
def test_a_named_setting_exists(word: str) -> None:
    key, _, value = word.partition("=")
    if key == "recipe":
        assert (ROOT / "cfg" / "recipes" / f"{value}.yaml").is_file()
    else:
        assert key in {**DEFAULT_CFG_DICT, **DEFAULTS}


@pytest.mark.parametrize("command", sorted({word for word in WORDS if word.startswith("gid-")}))
def test_a_named_command_exists(command: str) -> None:
    scripts = re.findall(
        r'^(gid[\w-]*) = "gid_yolo', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert command in scripts


@pytest.mark.parametrize("name", sorted({x.split()[1] for x in CODE if x.startswith("gid-study ")}))
def test_a_named_study_exists(name: str) -> None:
    assert (ROOT / "cfg" / "studies" / f"{name}.yaml").is_file()


def test_names_of_functions_exist() -> None:
    # A name beside a link belongs to the linked file
    found = re.findall(r"\[\w+\.py\]\(([^)]+)\), `(\w+)`", TEXT)
    assert found
    for link, name in found:
        assert re.search(rf"^(def|class) {name}\b", (PAPER.parent / link).read_text(encoding="utf-8"), re.MULTILINE), (
            name
        )


def test_every_equation_table_and_figure_is_on_the_page() -> None:
    parts = sections()
    assert all(re.search(rf"eq\. {i}\b", parts["Equations"]) for i in range(1, 12))
    assert all(f"gid-study table{i} " in parts["Tables"] for i in range(1, 8))
    assert all(f"figure {i}" in parts["Figures"] for i in range(1, 6))


def test_defaults_are_the_ones_said() -> None:
    # The last column of the table of choices gives each setting at its default; methods are chosen by name
    rows = [row.split("|") for row in sections()["What the paper leaves open, and what is done here"].splitlines()]
    said = [span for row in rows if len(row) > 4 for span in re.findall(r"`(\w+=[^`]+)`", row[4])]
    said = [x.split("=") for x in said if not x.startswith("distill=") and x != "gid_response=0"]
    assert len(said) > 10
    assert {key: value for key, value in said if str(DEFAULTS[key]) not in {value, f"{value}.0"}} == {}


def test_tolerances_are_the_ones_the_tests_hold() -> None:
    tree = ast.parse((ROOT / "tests" / "distill" / "test_autocast.py").read_text(encoding="utf-8"))
    held = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    said = re.findall(r"^\| `([A-Z]+)` \| ([\d.]+) \|", sections()["Stated tolerances"], re.MULTILINE)
    assert {name: float(value) for name, value in said} == {name: held[name] for name in ("VALUE", "GRADIENT", "SCORE")}
