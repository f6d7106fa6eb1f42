"""What the page says, read without a browser."""

import json
import re
from html.parser import HTMLParser

import pytest

from megatron_moe_comp.report.drawing import styles
from megatron_moe_comp.report.inputs import Results
from megatron_moe_comp.report.page import build_page, sections
from megatron_moe_comp.report.section import Missing
from tests.report.samples import network_rows, quality_runs, statistics

METHODS = ("none", "birdmoe")
ROWS = network_rows(METHODS, ("200mbit", "none"), ranks=(4,))
RUNS = quality_runs(METHODS, points=20)
STATISTICS = [("a2a", statistics("birdmoe", 5.2))]
ALONE = {
    "network": (
        Results(network=ROWS),
        ["Speed-up against bandwidth", "Where a method pays", "Where the time of a step goes"],
    ),
    "quality": (Results(quality=RUNS), ["Compression against quality", "Training loss"]),
    "statistics": (Results(statistics=STATISTICS), ["Bytes of each wire and layer"]),
}


@pytest.fixture(scope="module")
def page():
    return build_page(Results(ROWS, RUNS, STATISTICS))


class Tags(HTMLParser):
    """Every element's attributes, and tags left open."""

    VOID = ("meta", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_names_nothing_outside_itself(page):
    tags = Tags(page)
    assert tags.open == []
    names = [a["id"] for _, a in tags.attributes if "id" in a]
    assert len(names) == len(set(names))
    for tag, attributes in tags.attributes:
        assert tag not in ("script", "iframe", "img", "object")
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href"):
                assert value.startswith("data:,") or value.removeprefix("#") in names
    assert set(re.findall(r"url\(([^)]*)\)", page)) <= {f"#{name}" for name in names}
    assert "@import" not in page


def test_the_same_results_give_the_same_page():
    results = Results(statistics=STATISTICS)
    assert build_page(results) == build_page(results)


def test_tables_hold_the_numbers_of_the_figures(page):
    for row in ROWS:
        cell = f"{row['speedup']:.2f} ({row['speedup_min']:.2f} to {row['speedup_max']:.2f})"
        assert row["method"] == "none" or cell in page
        assert all(f">{ms:.0f}</td>" in page for ms in row["phases"].values())
    free = {r["rate"]: r["step_ms"] for r in ROWS if r["method"] == "none"}
    assert f"limit {free['200mbit'] / free['none']:.2f}" in page
    last = [run["curve"][-1][1] for run in RUNS if run["setting"] == "birdmoe"]
    assert f"{sum(last) / 3:.3f} ({min(last):.3f} to {max(last):.3f})" in page
    minutes = 200 * next(r for r in ROWS if r["method"] == "birdmoe")["step_ms"] / 60e3
    assert f">{minutes:.1f}</td>" in page
    assert "dispatch_bwd" in page


@pytest.mark.parametrize("kind", ALONE)
def test_absent_data_leave_a_line_that_says_what_produces_them(kind):
    results, expected = ALONE[kind]
    every = sections(results)
    shown = [s.title for s in every if not isinstance(s, Missing)]
    left = {s.title: s.remedy for s in every if isinstance(s, Missing)}
    assert len(every) == 8
    assert set(shown) >= set(expected)
    assert "Training loss against time on a link" in left
    assert all("benchmarks/" in remedy or "stats-json" in remedy for remedy in left.values())
    if kind == "statistics":
        page = build_page(results)
        assert page.count("Left out: needs") == len(left)
        assert all(title in page for title in left)


def test_quality_without_a_baseline_has_no_ratio_but_curves():
    runs = quality_runs(("birdmoe", "bf16"), seeds=(1,), points=20)
    by_title = {s.title: s for s in sections(Results(quality=runs))}
    assert isinstance(by_title["Compression against quality"], Missing)
    assert len(by_title["Training loss"].pictures) == 1


def test_runs_without_curves_or_layers_are_used_for_what_they_have():
    runs = [{**run, "curve": [], "stats": {"ratio_fp32": 2.0}} for run in RUNS]
    by_title = {s.title: s for s in sections(Results(quality=runs))}
    shown = [title for title, s in by_title.items() if not isinstance(s, Missing)]
    assert shown == ["Compression against quality"]


def test_names_are_text_not_markup():
    rows = json.loads(json.dumps(ROWS).replace("birdmoe", "<b>&amp;"))
    page = build_page(Results(network=rows, statistics=[("<i>", statistics("<u>", 2.0))]))
    assert "&lt;b&gt;&amp;amp;" in page
    assert not re.search("<[biu]>", page)


def test_many_methods_stay_apart():
    """More methods than colours, markers or dashes: no two look alike."""
    looks = styles([f"method {n}" for n in range(40)], "none")
    assert len({str(vars(look)) for look in looks.values()}) == 41
