"""What is in the file, without a browser; test_page_in_browser.py has what it does."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from browser import missing
from report_helpers import make_example, make_matrix, make_row

from gid_yolo.export.examples import figures, match, slots_of
from gid_yolo.export.page import render, write_html
from gid_yolo.export.report import BenchmarkReport
from gid_yolo.export.rows import Detections, Example

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>{{table}}'


class Reader(HTMLParser):
    """Every tag with its attributes, and all words outside of style and script."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.words, self.inside = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside not in {"script", "style"}:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def test_everything_is_on_the_page():
    notes = ("WARNING: FAILED, and so without results: plain", "note: seed is 1", "without a kind")
    settings = {"summary": "the head line", "versions": {"torch": "9.9"}, "images": [1, 2], "gpu": None}
    page = Reader(render(BenchmarkReport(make_matrix(), settings, notes, None, (make_example(),), True)))
    for words in (
        "the head line",
        "equal training budgets",
        "+10.0 mAP",
        "distilled int8 vs fp32: -0.5 mAP at 2.0 x its speed",
        "warning FAILED, and so without results: plain",
        "note without a kind",
        "Failed, and so left out: plain retina_nano (int8, CPU, batch 1, 320x416).",
        "versions torch 9.9",
        "images 1, 2",
        "score of at least 0.30",
        "ground truth 2 objects",
        "plain 1 of 2 found, 1 false",
        "teacher 0 of 2 found, 0 false",
    ):
        assert words in page.text, words


def test_no_name_can_become_code():
    rows = tuple(make_row(role, label=f"{EVIL}{role}", name=EVIL, backbone=EVIL) for role in ("model", "other"))
    rows += (make_row("teacher", failed=EVIL, provider=EVIL, precision=EVIL),)
    example = make_example(EVIL, {0: EVIL, 1: EVIL})
    example = Example(
        EVIL, example.image, example.true_boxes, example.true_classes, {EVIL: example.detections["plain"]}, {0: EVIL}
    )
    report = BenchmarkReport(rows, {EVIL: EVIL, "summary": EVIL}, (EVIL, f"WARNING: {EVIL}"), None, (example,))
    page = Reader(render(report))
    tags = [tag for tag, _ in page.tags]
    assert (tags.count("script"), tags.count("img")) == (1, 0)
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert EVIL in page.text


def test_the_page_asks_for_nothing():
    page = render(BenchmarkReport(make_matrix(), examples=(make_example(),)))
    addresses = [a[key] for _, a in Reader(page).tags for key in ("src", "href", "xlink:href", "action") if key in a]
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not re.search(r"https?:|@import|url\(", page)
    assert "default-src 'none'" in page


@pytest.mark.parametrize(
    "rows", [(), make_matrix()[:1], (make_row("model", failed="x"),), (make_row("model", ap=-1.0),)]
)
def test_little_to_show(tmp_path, rows):
    write_html(BenchmarkReport(rows), tmp_path / "a.html")
    page = Reader((tmp_path / "a.html").read_text())
    assert ("There is no measurement to draw." in page.text) == (not rows or rows[0].ap is None)
    assert ("There are no rows." in page.text) == (not rows)
    assert "Examples" not in page.text
    assert "{{" not in page.text
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_unequal_budgets_are_on_the_page():
    report = BenchmarkReport((make_row("model"), make_row("baseline")), comparable=False)
    text = Reader(render(report)).text
    assert "not comparable" in text
    assert "distilled vs plain" not in text
    assert "comparable" not in Reader(render(BenchmarkReport(report.rows))).text


def test_size_is_modest():
    rng = np.random.default_rng(0)
    boxes = rng.uniform(0, 500, (300, 4))
    boxes[:, 2:] += boxes[:, :2]
    many = Detections(boxes, rng.uniform(0.05, 1, 300), rng.integers(0, 80, 300))
    image = rng.integers(0, 255, (1080, 1920, 3), dtype=np.uint8)  # noise compresses worst
    found = {"distilled": many, "plain": many, "teacher": many}
    examples = tuple(Example(f"{i}.jpg", image, boxes[:40], many.classes[:40], found, {}) for i in range(6))
    assert len(render(BenchmarkReport(make_matrix(), examples=examples))) < 2_000_000


def test_objects_are_found_by_class_and_once():
    objects, kinds = np.array([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]]), np.array([0, 0, 1])
    boxes = np.array([[0.0, 0, 10, 11], [0, 0, 10, 10], [20, 0, 25, 10], [40, 0, 50, 10], [20, 0, 24, 10]])
    found = Detections(boxes, np.array([0.9, 0.8, 0.7, 0.6, 0.5]), np.array([0, 0, 0, 0, 0]))
    right, scores = match(found, objects, kinds)
    # The second has lost its object to the first, the third overlaps by exactly a half, the fourth is of another class
    assert right.tolist() == [True, False, True, False, False]
    np.testing.assert_array_equal(scores, [0.9, 0.7, np.nan])
    assert match(found, np.zeros((0, 4)), np.zeros(0))[0].tolist() == [False] * 5


def test_one_matching_serves_every_threshold():
    rng = np.random.default_rng(0)
    objects, kinds = rng.uniform(0, 60, (12, 4)), rng.integers(0, 2, 12)
    objects[:, 2:] = objects[:, :2] + 25
    boxes = rng.uniform(0, 60, (80, 4))
    boxes[:, 2:] = boxes[:, :2] + 25
    found = Detections(boxes, np.sort(rng.uniform(0, 1, 80))[::-1], rng.integers(0, 2, 80))
    right, scores = match(found, objects, kinds)
    for end in (5, 20, 50):
        part = Detections(boxes[:end], found.scores[:end], found.classes[:end])
        fewer, at = match(part, objects, kinds)
        assert fewer.tolist() == right[:end].tolist()
        assert (~np.isnan(at)).tolist() == (scores >= found.scores[end - 1]).tolist()


def test_boxes_are_scaled_with_the_image():
    example = make_example()
    page = figures(example, 0, slots_of([example]))
    assert 'viewBox="0 0 480 240"' in page  # 600 x 300
    assert '<rect class="box k0" x="8.0" y="8.0" width="80.0" height="80.0" >' in page
    assert page.count("data:image/jpeg") == 1  # the image is there once for all models
    assert page.count('href="#example0"') == 3


def test_odd_examples():
    image = np.zeros((20, 30, 3), np.uint8)
    odd = Detections(np.array([[0.0, 0, np.inf, 5], [1, 1, 9, 9]]), np.array([0.9, 0.02]), np.array([0.0, 1.0]))
    example = Example("b", image, np.zeros((0, 4)), np.zeros(0), {"model": odd}, {})
    page = Reader(figures(example, 3, slots_of([example]))).text
    assert page == "b ground truth 0 objects model 0 of 0 found, 0 false"


def test_without_a_browser_ci_fails_and_users_skip(monkeypatch):
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="CI must test the page in a browser: none"):
        missing("none")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="none"):
        missing("none")
