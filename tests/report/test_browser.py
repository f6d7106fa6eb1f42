"""The page in a real browser: on a desk, on a phone, on paper."""

import shutil

import pytest

from megatron_moe_comp.report.__main__ import main
from tests.report.samples import write_samples

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
SMALLEST_TEXT_PX = 6
FIGURES = 22


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path)
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    main([str(write_samples(directory / "results")), "-o", str(directory / "report.html")])
    return f"file://{directory}/report.html"


@pytest.fixture
def open_page(browser, report):
    opened = []

    def open_at(width, height):
        page = browser.new_page(viewport={"width": width, "height": height})
        opened.append(page)
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("requestfailed", lambda request: page.said.append(request.url))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(report)
        page.wait_for_load_state("networkidle")
        return page

    yield open_at
    for page in opened:
        page.close()


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)], ids=["desk", "phone"])
def test_everything_shows_and_nothing_is_fetched(open_page, report, width, height):
    page = open_page(width, height)
    assert page.said == []
    assert [url for url in page.asked if not url.startswith("data:")] == [report]
    figures = page.locator("figure svg")
    assert figures.count() == FIGURES
    for index in range(FIGURES):
        assert figures.nth(index).is_visible()
        box = figures.nth(index).bounding_box()
        assert box["width"] > 250
        assert box["height"] > 120
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    drawn = page.evaluate(
        "[...document.querySelectorAll('figure svg')].map(f => f.querySelectorAll('path').length)"
    )
    assert min(drawn) > 10
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(overflow) == 0
    smallest = page.evaluate(
        """Math.min(...[...document.querySelectorAll('svg text')].map(text => {
            const matrix = text.getScreenCTM();
            return parseFloat(getComputedStyle(text).fontSize) * Math.hypot(matrix.a, matrix.b);
        }))"""
    )
    assert smallest >= SMALLEST_TEXT_PX


def test_wide_tables_scroll_on_a_phone(open_page):
    page = open_page(390, 844)
    boxes = "[...document.querySelectorAll('.scroll')]"
    widest = f"{boxes}.reduce((a, b) => a.scrollWidth > b.scrollWidth ? a : b)"
    assert page.evaluate(f"{widest}.scrollWidth") > 390
    assert (
        page.evaluate(f"(box => {{ box.scrollLeft = 100; return box.scrollLeft }})({widest})") > 0
    )


def test_text_of_a_figure_does_not_leave_it(open_page):
    page = open_page(1280, 900)
    outside = page.evaluate(
        """[...document.querySelectorAll('figure svg')].flatMap(svg => {
            const frame = svg.getBoundingClientRect();
            return [...svg.querySelectorAll('text')].filter(text => {
                const box = text.getBoundingClientRect();
                return box.left < frame.left - 2 || box.right > frame.right + 2
                    || box.top < frame.top - 2 || box.bottom > frame.bottom + 2;
            }).map(text => text.textContent);
        })"""
    )
    assert outside == []


def test_on_paper_no_table_or_figure_is_cut_off(open_page):
    """Paper does not scroll: at the width of A4 less its margins, in points of the screen."""
    page = open_page(688, 1000)
    page.emulate_media(media="print")
    widths = page.evaluate(
        "[...document.querySelectorAll('table, figure')].map(t => t.getBoundingClientRect().right)"
    )
    assert max(widths) <= 688
    assert page.locator("nav").is_hidden()
    assert len(page.pdf(format="A4")) > 20_000
