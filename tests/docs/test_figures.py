"""The figures of the documentation are those that the code draws."""

import sys
from pathlib import Path

import pytest

FIGURES = Path(__file__).parents[2] / "docs/figures"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(FIGURES))
    import draw

    directory = tmp_path_factory.mktemp("figures")
    draw.main(["--output", str(directory)])
    return {path.name: path.read_text() for path in directory.iterdir()}


def test_committed_figures_are_up_to_date(drawn):
    committed = {path.name: path.read_text() for path in FIGURES.glob("*.svg")}
    stale = [name for name in committed.keys() | drawn if committed.get(name) != drawn.get(name)]
    assert not stale, "run `python docs/figures/draw.py`"


def test_every_figure_is_shown_with_a_text_for_those_who_do_not_see_it(drawn):
    page = (FIGURES.parent / "how-it-works.md").read_text()
    for name in drawn:
        before, found, _ = page.partition(f"](figures/{name})")
        assert found, name
        assert len(before.rpartition("![")[2]) > 40, name
