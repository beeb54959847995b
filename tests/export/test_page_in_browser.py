"""The page in a real browser: sorting, filters, pictures, and that it asks the network for nothing."""

import json
import socket
from dataclasses import replace

import pytest
from browser import console, open_browser, requests, visit
from report_helpers import make_example, make_matrix, make_row

from gid_yolo.engine.coco_eval import COLUMNS
from gid_yolo.export.page import render, write_html
from gid_yolo.export.report import BenchmarkReport, write_json

HOSTILE = "<script>document.title = 'run'</script><img src=http://127.0.0.1:9/a.png>"


@pytest.fixture(scope="module")
def browser():
    with open_browser() as driver:
        yield driver


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    settings = {"summary": "summary", "versions": {"torch": "9"}, "name": HOSTILE}
    examples = (make_example(), make_example(HOSTILE, {0: HOSTILE, 1: "dog"}))
    report = BenchmarkReport(make_matrix(), settings, (f"WARNING: {HOSTILE}",), folder, examples, True)
    write_html(report, folder / "benchmark.html")
    write_json(report, folder / "benchmark.json")
    return folder


@pytest.fixture
def page(browser, folder):
    visit(browser, folder / "benchmark.html")
    return browser


def column(driver, key):
    """`data-value` of a column from top to bottom, and which rows these are."""
    script = """
        const heads = [...document.querySelectorAll('thead th')];
        const i = heads.findIndex(head => head.dataset.key === arguments[0]);
        return [...document.querySelectorAll('tbody tr')].map(row => [row.children[i].dataset.value, +row.dataset.row]);
    """
    return [tuple(pair) for pair in driver.execute_script(script, key)]


def click(driver, key):
    driver.execute_script(f"document.querySelector('[data-key=\"{key}\"] button').click()")


def sort_of(driver, key):
    return driver.execute_script(f"return document.querySelector('[data-key=\"{key}\"]').getAttribute('aria-sort')")


def by_value(pairs, down=False):
    """Numbers as numbers, stable, missing values last in both directions."""

    def value(pair):
        try:
            return float(pair[0])
        except ValueError:
            return pair[0].lower()

    there = [pair for pair in pairs if pair[0]]
    return sorted(there, key=value, reverse=down) + [pair for pair in pairs if not pair[0]]


def test_no_error_and_no_request(page, folder):
    assert requests(page) == [(folder / "benchmark.html").as_uri()]
    assert console(page) == []
    assert page.title == "distilled retina_nano: benchmark"
    assert page.execute_script("return document.scripts.length") == 1


def test_only_the_pages_own_script_may_run(browser, folder):
    # What escaping might ever miss, put into a copy of the page
    copy = folder / "hostile.html"
    with socket.create_server(("127.0.0.1", 0)) as server:
        hostile = HOSTILE.replace(":9/", f":{server.getsockname()[1]}/")
        copy.write_text(render(BenchmarkReport((make_row("model"),))).replace("</main>", f"</main>{hostile}"))
        visit(browser, copy)
        server.settimeout(0.5)
        with pytest.raises(TimeoutError):
            server.accept()  # nobody called
    assert browser.title == "distilled retina_nano: benchmark"
    assert sum("Content Security Policy" in message for message in console(browser)) == 2
    click(browser, "p50")
    assert sort_of(browser, "p50") == "ascending"  # its own script still runs


def test_every_column_is_sorted_both_ways(page):
    keys = page.execute_script("return [...document.querySelectorAll('thead th')].map(head => head.dataset.key)")
    assert {"title", "precision", "size", "mAP", "AR_L", "p50", "p99", "end_to_end", "memory", "parity"} <= set(keys)
    for key in keys:
        for down in (False, True):
            before = column(page, key)
            click(page, key)
            assert column(page, key) == by_value(before, down), (key, down)
            assert sort_of(page, key) == ("descending" if down else "ascending")
    sorts = page.execute_script("return document.querySelectorAll('th:not([aria-sort=none])[aria-sort]').length")
    assert sorts == 1


def test_numbers_are_not_sorted_as_words(page):
    click(page, "p50")
    values = [value for value, _ in column(page, "p50")]
    assert [float(value) for value in values[:5]] == [5.0, 5.05, 10.0, 10.0, 10.1]
    assert values[-1] == ""  # the row that failed
    click(page, "p50")
    values = [value for value, _ in column(page, "p50")]
    assert (float(values[0]), values[-1]) == (pytest.approx(80 / 0.9), "")


def test_a_head_is_a_button_for_the_keyboard_too(page):
    from selenium.webdriver.common.keys import Keys

    head = page.find_element("css selector", '[data-key="mAP"] button')
    head.send_keys(Keys.ENTER)
    assert sort_of(page, "mAP") == "ascending"
    head.send_keys(Keys.SPACE)
    assert sort_of(page, "mAP") == "descending"


def test_values_are_those_of_the_json_file(page, folder):
    rows = json.loads((folder / "benchmark.json").read_text())["rows"]
    numbers = 0
    for key in ("mAP", "AP50", "p50", "p95", "p99", "images_per_second", "end_to_end", "memory", "ap_drop", "gflops"):
        for value, number in column(page, key):
            row = rows[number]
            stored = (row["columns"] or {}).get(key) if key in COLUMNS else row[key]
            if row["failed"] and key == "ap_drop":
                stored = None
            assert value == ("" if stored is None else json.dumps(stored)), (key, number)
            numbers += stored is not None
    assert numbers > 150
    assert "precision" in page.execute_script("return document.querySelector('table').innerText")
    assert "provider" not in page.execute_script("return document.querySelector('table').innerText")  # all share it


def test_all_columns_are_a_click_away(page):
    def heads():
        return page.execute_script("return [...document.querySelectorAll('th')].filter(x => x.offsetWidth).length")

    few = heads()
    page.find_element("id", "all").click()
    assert heads() > few + 10


def test_the_picture_is_there(page):
    found = page.execute_script("""
        const plots = [...document.querySelectorAll('svg.plot')].filter(x => x.getBoundingClientRect().width);
        const {width, height} = plots[0].getBoundingClientRect();
        const points = [...plots[0].querySelectorAll('g.point')];
        const boxes = points.map(x => x.getBoundingClientRect());
        return [plots.length, width, height, points.length, Math.min(...boxes.map(x => x.width)), points[0].ariaLabel];
    """)
    plots, width, height, points, least, name = found
    assert plots == 1
    assert width > 800
    assert height > 300
    assert points == 17  # of 18 rows one failed
    assert least > 5
    assert "mAP" in name
    assert "ms per image" in name


def test_a_phone_gets_its_own_picture_and_no_sideways_scrolling(page):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        page.refresh()
        assert page.execute_script("return document.documentElement.scrollWidth") == 390
        shown = page.execute_script(
            "return [...document.querySelectorAll('svg.plot')].filter(x => x.getBoundingClientRect().width).length"
        )
        assert shown == 1
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_point_says_what_it_is_and_marks_its_row(page):
    tip = page.execute_script("""
        const point = document.querySelector('.for-wide g.point[data-row="2"]');
        point.dispatchEvent(new Event('pointerenter'));
        return [document.querySelector('.tip').innerText, document.querySelector('tr.marked').dataset.row];
    """)
    assert tip[0].splitlines()[:4] == [
        "distilled retina_nano",
        "int8, CPU, batch 1, 256x320",
        "39.5 mAP",
        "5.00 ms per image, 95 % within 5.50",
    ]
    assert tip[1] == "2"


def test_filters_hide_rows_and_dim_points(page):
    page.execute_script("document.querySelector('[data-facet=precision][value=\"0\"]').click()")
    found = page.execute_script("""
        const rows = [...document.querySelectorAll('tbody tr')].filter(row => !row.hidden);
        const dim = document.querySelectorAll('.for-wide g.point.off').length;
        return [rows.map(row => row.innerText.match(/(fp32|fp16|int8)/)[0]), dim];
    """)
    assert set(found[0]) == {"fp16", "int8"}
    assert (len(found[0]), found[1]) == (12, 6)
    page.execute_script("document.querySelector('[data-facet=precision][value=\"0\"]').click()")
    assert page.execute_script("return document.querySelectorAll('tbody tr[hidden], .off').length") == 0


def test_example_images_are_drawn(page):
    sizes = page.execute_async_script("""
        const done = arguments[0];
        Promise.all([...document.querySelectorAll('svg image')].map(async image => {
            const copy = new Image();
            copy.src = image.getAttribute('href');
            await copy.decode();
            return [copy.naturalWidth, copy.naturalHeight];
        })).then(done, error => done(String(error)));
    """)
    assert sizes == [[480, 240]] * 2
    drawn = page.execute_script("""
        return [...document.querySelectorAll('figure svg')].map(x => {
            const {width, height} = x.querySelector('image, use').getBoundingClientRect();
            return width > 100 && height > 50;
        });
    """)
    assert drawn == [True] * 8


def captions(driver):
    script = "return [...document.querySelectorAll('figcaption')].map(x => x.innerText)"
    return driver.execute_script(script)[:4]  # of the first example


def test_the_threshold_decides_what_is_found(page):
    assert [text.split(maxsplit=1) for text in captions(page)[1:]] == [
        ["distilled", "2 of 2 found, 0 false"],
        ["plain", "1 of 2 found, 1 false"],
        ["teacher", "0 of 2 found, 0 false"],
    ]
    expected = {
        "0.35": (2, 1, 1, 1),
        "0.4": (2, 1, 0, 1),
        "0.5": (2, 0, 0, 2),
        "0.9": (1, 0, 0, 2),
        "0.1": (2, 1, 1, 1),
    }
    for least, (distilled, plain, false, missed) in expected.items():
        page.execute_script(
            "const s = document.querySelector('#score'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))",
            least,
        )
        found = [text.split(maxsplit=1)[1] for text in captions(page)[1:3]]
        assert found == [f"{distilled} of 2 found, 0 false", f"{plain} of 2 found, {false} false"], least
        shown = page.execute_script(
            "return [...document.querySelectorAll('figure')][2].querySelectorAll('.missed:not([hidden])').length"
        )
        assert shown == missed, least
    assert console(page) == []


@pytest.mark.parametrize(
    "rows",
    [(), (make_row("model"),), (make_row("model", failed="x"),), (replace(make_row("model"), columns=None),)],
)
def test_little_to_show_is_no_error(browser, tmp_path, rows):
    write_html(BenchmarkReport(rows), tmp_path / "a.html")
    visit(browser, tmp_path / "a.html")
    assert console(browser) == []
    assert requests(browser) == [(tmp_path / "a.html").as_uri()]
