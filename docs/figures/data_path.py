"""The path of the data of one MoE layer through the four wires."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from style import INK, PAPER

from megatron_moe_comp.report.drawing import COLOURS

ORANGE = COLOURS[1]
STEP, WIDTH, HEIGHT = 1.22, 1.06, 0.52
LEFT_WIRE = 3
STOCK, OURS, OPTIONAL = "#FFFFFF", "#CFE6F7", "#FBE8C8"

# (column, lane, text, kind); lane 1 is the rank with the tokens, lane 0 the one with the experts.
FORWARD = (
    (0, 1, "router", STOCK),
    (1, 1, "permute", STOCK),
    (2, 1, "cluster\n(lsh)", OPTIONAL),
    (3, 1, "encode", OURS),
    (3, 0, "decode", OURS),
    (4, 0, "experts", STOCK),
    (5, 0, "encode", OURS),
    (5, 1, "decode", OURS),
    (6, 1, "restore\n(lsh)", OPTIONAL),
    (7, 1, "unpermute", STOCK),
)
BACKWARD = (
    (7, 1, "unpermute,\nbackward", STOCK),
    (6, 1, "restore,\nbackward", OPTIONAL),
    (5, 1, "encode", OURS),
    (5, 0, "decode", OURS),
    (4, 0, "experts,\nbackward", STOCK),
    (3, 0, "encode", OURS),
    (3, 1, "decode", OURS),
    (2, 1, "cluster,\nbackward", OPTIONAL),
    (1, 1, "permute,\nbackward", STOCK),
    (0, 1, "router,\nbackward", STOCK),
)


def data_path() -> Figure:
    """Returns the figure."""
    figure = Figure(figsize=(9.4, 5.2), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-1.75, 9.25), ylim=(-0.75, 5.33))
    axes.axis("off")
    _pass(axes, "forward", FORWARD, 3.1, ("dispatch_fwd", "combine_fwd"))
    _pass(axes, "backward", BACKWARD, 0.35, ("combine_bwd", "dispatch_bwd"))
    for i, (kind, text) in enumerate(
        (
            (STOCK, "Megatron"),
            (OPTIONAL, "with --moe-a2a-compress=lsh"),
            (OURS, "codec, writes into and reads from the message"),
        )
    ):
        x = (-1.6, 0.6, 3.9)[i]
        axes.add_patch(Rectangle((x, -0.58), 0.3, 0.2, facecolor=kind, edgecolor=INK, lw=0.8))
        axes.text(x + 0.4, -0.48, text, va="center", fontsize=9, color=INK)
    return figure


def _pass(
    axes: Axes,
    title: str,
    steps: tuple[tuple[int, int, str, str], ...],
    bottom: float,
    wires: tuple[str, str],
) -> None:
    """Draws one direction: two lanes, and the wires between them."""
    lanes = {0: bottom, 1: bottom + 1.45}
    for lane, name in ((1, "rank with\nthe tokens"), (0, "rank with\nthe experts")):
        band = Rectangle((-1.7, lanes[lane] - 0.4), 10.9, 0.8, facecolor="#F1F1EC", lw=0)
        axes.add_patch(band)
        axes.text(-1.6, lanes[lane], name, va="center", fontsize=9, color=INK)
    axes.text(-1.6, bottom + 1.45 + 0.56, title, fontsize=10.5, weight="bold", color=INK)
    names = iter(wires)
    for i, (column, lane, text, kind) in enumerate(steps):
        x, y = column * STEP, lanes[lane]
        corner = (x - WIDTH / 2, y - HEIGHT / 2)
        box = FancyBboxPatch(
            corner, WIDTH, HEIGHT, "round,pad=0,rounding_size=0.08", fc=kind, ec=INK, lw=0.9
        )
        axes.add_patch(box)
        axes.text(x, y, text, ha="center", va="center", fontsize=8.5, color=INK, linespacing=1.05)
        if i == 0:
            continue
        before, lane_before = steps[i - 1][0] * STEP, steps[i - 1][1]
        if lane == lane_before:
            side = WIDTH / 2 if x > before else -WIDTH / 2
            _arrow(axes, (before + side, y), (x - side, y), INK, 1.0)
        else:
            up = HEIGHT / 2 if lane > lane_before else -HEIGHT / 2
            _arrow(axes, (x, lanes[lane_before] + up), (x, y - up), ORANGE, 2.2)
            side = "right" if column == LEFT_WIRE else "left"
            axes.text(
                x + (0.12 if side == "left" else -0.12),
                bottom + 0.725,
                f"{next(names)}: one uint8 message",
                ha=side,
                va="center",
                fontsize=9,
                weight="bold",
                color="#A84300",
            )
    note = "rows whose expert is on their own rank skip codec and wire"
    if title == "backward":
        note = "a message takes the way back of its forward: same ranks, same counts"
    axes.text(9.1, bottom + 1.45 + 0.56, note, ha="right", fontsize=8.5, color=INK)


def _arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, width: float
) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, shrinkA=0, shrinkB=0, color=colour,
            lw=width,
        )
    )  # fmt: skip
