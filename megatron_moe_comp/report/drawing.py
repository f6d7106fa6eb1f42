"""Matplotlib as this report uses it: one panel per picture, inline SVG, styles of the settings.

Panels are narrow, so that their text stays readable when a phone or a column of paper shrinks
them. Colours are those of Okabe and Ito, which all readers tell apart; markers, dashes and hatches
say the same without colour.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from itertools import cycle
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH, HEIGHT = 5.2, 3.4
BAR_HEIGHT, BAR_MARGIN = 0.27, 1.35
BLACK, GREY = "#000000", "#BBBBBB"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("s", "^", "D", "v", "P", "X", "<", "*", ">", "p", "h")
DASHES: tuple[Any, ...] = ((0, (6, 2)), "-.", (0, (1, 1.2)), (0, (8, 2, 1, 2, 1, 2)))
HATCHES = ("", "////", "|||", "\\\\\\\\", "")

SETTINGS = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "font.size": 10,
    "grid.color": "#E4E4E4",
    "hatch.linewidth": 0.7,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 5.5,
    # The same results give the same page; it makes the names of its figures distinct.
    "svg.hashsalt": "report",
    # Text stays text: it can be searched, selected and read aloud. The page sets its font.
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Style:
    """How a setting is drawn, the same in all figures."""

    color: str
    marker: str
    linestyle: Any


def styles(names: Iterable[str], baseline: str) -> dict[str, Style]:
    """Returns a style for each name; the baseline is black and solid."""
    others = [name for name in dict.fromkeys(names) if name != baseline]
    looks = zip(others, cycle(COLOURS), cycle(MARKERS), cycle(DASHES), strict=False)
    return {baseline: Style(BLACK, "o", "-")} | {name: Style(*look) for name, *look in looks}


@contextmanager
def look() -> Iterator[None]:
    """Sets Matplotlib's settings for the figures made within."""
    with mpl.rc_context({**mpl.rcParamsDefault, "backend": "agg", **SETTINGS}):
        yield


def panel(height: float = HEIGHT) -> tuple[Figure, Axes]:
    """Returns a figure and its only axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def legend_below(figure: Figure, axes: Axes, columns: int = 3) -> None:
    """Makes the figure higher by a legend of everything that has a label, below the axes."""
    handles, labels = axes.get_legend_handles_labels()
    rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * rows + 0.1)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=3)


def stacked_bars(
    names: Sequence[str],
    parts: Sequence[tuple[str, Sequence[float]]],
    label: str,
    colours: Sequence[str] = (*COLOURS, BLACK),
) -> str:
    """Returns a panel of a horizontal bar for each name, made of parts (name, lengths), as SVG."""
    figure, axes = panel(BAR_MARGIN + BAR_HEIGHT * len(names))
    starts = [0.0] * len(names)
    for (part, lengths), colour, hatch in zip(parts, cycle(colours), cycle(HATCHES), strict=False):
        axes.barh(
            names, lengths, 0.7, starts, color=colour, hatch=hatch, edgecolor="white", label=part
        )
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(label)
    legend_below(figure, axes)
    return to_svg(figure)


def to_svg(figure: Figure) -> str:
    """Returns the figure as an <svg> element that names no other resource."""
    stream = StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(stream, format="svg", metadata=metadata)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].rstrip()
    # Groups are named alike in every figure, and the names of a page are unique.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    # The page gives the size; what is left of it is the shape, in viewBox.
    return re.sub(r'^<svg ([^>]*?)width="[^"]*" height="[^"]*"|^<svg (?=[^>]*$)', r"<svg \1", svg)
