"""What the figures of the documentation share: paper that is light in dark themes, too."""

from io import StringIO
from pathlib import Path

from matplotlib.figure import Figure

PAPER, INK, FAINT = "#FCFCFA", "#222222", "#8A8A8A"


def save(figure: Figure, path: Path) -> None:
    """Writes the figure as SVG, without date or program."""
    for axes in figure.axes:
        axes.set_facecolor(PAPER)
    stream = StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(stream, format="svg", metadata=metadata, facecolor=PAPER)
    lines = (line.rstrip() for line in stream.getvalue().splitlines())
    path.write_text("\n".join(lines) + "\n")
