"""Draws the figures of docs/how-it-works.md, from what the package's own code computes.

    python docs/figures/draw.py              # writes the SVG files beside it
    python docs/figures/draw.py --output DIR

Needs Matplotlib. The same versions write the same files: no date, no random names.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import torch
from data_path import data_path
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from style import FAINT, INK, PAPER, save

from megatron_moe_comp.compression.bit_allocation import allocate_bits, most_loaded
from megatron_moe_comp.compression.codec import Codec
from megatron_moe_comp.compression.codecs.dithered import Dithered
from megatron_moe_comp.compression.codecs.identity import Identity
from megatron_moe_comp.compression.codecs.rq import RandomQuantization
from megatron_moe_comp.compression.packet import Exact, Packet, Peer
from megatron_moe_comp.compression.random_stream import RandomStream
from megatron_moe_comp.report.drawing import COLOURS, GREY, look

BLUE, ORANGE, GREEN, PINK, SKY, YELLOW = COLOURS


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes every figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, metavar="DIR")
    options = parser.parse_args(arguments)
    with look(), mpl.rc_context({"svg.hashsalt": "docs"}):
        for name, draw in FIGURES.items():
            save(draw(), options.output / f"{name}.svg")


def message() -> Figure:
    """Returns the layout of a dispatch message of one rank to three others."""
    hidden, per_node, own = 64, 2, 0
    rows = torch.tensor([[5, 2, 3, 12], [4, 6, 2, 3], [6, 1, 9, 2], [3, 5, 2, 7]])
    nodes = torch.arange(4) // per_node
    plain = nodes[:, None] == nodes
    far = rows.masked_fill(plain, 0)
    bits = allocate_bits(far, "optimal", target_bits=6, min_bits=3, max_bits=8)
    identity, rq = Identity(), RandomQuantization()
    counts = rows[own].tolist()
    peers = [
        Peer(n, int(bits[own, rank]), identity if plain[own, rank] else rq)
        for rank, n in enumerate(counts)
    ]
    like = torch.empty((0, hidden), dtype=torch.bfloat16)
    leaving = tuple(0 if rank == own else n for rank, n in enumerate(counts))
    packet = Packet.plan(peers, own, like, [Exact(leaving, 4)])

    figure = Figure(figsize=(8, 3.3), facecolor=PAPER)
    axes = figure.add_axes((0.235, 0.17, 0.745, 0.66))
    shown = [rank for rank in range(len(counts)) if rank != own]
    for line, rank in enumerate(shown):
        start, size = packet.layout.offsets[rank][0], packet.layout.byte_splits[rank]
        sections = [("probabilities", 4 * counts[rank])]
        kinds = peers[rank].codec.sections(hidden, like.dtype, peers[rank].num_bits)
        sections += [(section.name, section.size(counts[rank])) for section in kinds]
        ends = [*packet.layout.offsets[rank][1:], start + size]
        for (name, used), offset, end in zip(
            sections, packet.layout.offsets[rank], ends, strict=True
        ):
            _part(axes, line, offset - start, used, PART_COLOURS[name], str(used))
            if end > offset + used:
                _part(axes, line, offset - start + used, end - offset - used, None, "")
        coding = "as they are" if plain[own, rank] else f"{peers[rank].num_bits} bits"
        where = "same node" if plain[own, rank] else "other node"
        label = f"to rank {rank}, {where}\n{counts[rank]} rows, {coding}\nbytes {start} to "
        axes.text(-8, line, label + str(start + size - 1), ha="right", va="center", fontsize=8.5)
    axes.set(xlim=(0, max(packet.layout.byte_splits) + 4), ylim=(2.5, -0.5), yticks=[])
    axes.set_xlabel("bytes of a segment")
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    _legend(
        figure, [*((c, n) for n, c in PART_COLOURS.items()), (None, "zeros, to a multiple of 16")]
    )
    return figure


PART_COLOURS = {"probabilities": YELLOW, "codes": SKY, "scales": PINK, "rows": GREEN}


def _part(axes: Axes, line: int, start: int, size: int, colour: str | None, text: str) -> None:
    look = {"facecolor": colour or PAPER, "hatch": None if colour else "/////"}
    axes.add_patch(Rectangle((start, line - 0.24), size, 0.48, edgecolor=INK, lw=0.7, **look))
    # What is too narrow for its number has it below.
    y = line if size > 3.2 * len(text) else line + 0.36
    axes.text(start + size / 2, y, text, ha="center", va="center", fontsize=8, color=INK)


def _legend(figure: Figure, entries: Sequence[tuple[str | None, str]]) -> None:
    handles = [
        Rectangle((0, 0), 1, 1, facecolor=c or PAPER, hatch=None if c else "/////", edgecolor=INK)
        for c, _ in entries
    ]
    labels = [name for _, name in entries]
    figure.legend(
        handles, labels, loc="upper center", ncols=len(entries), frameon=False, fontsize=9
    )


def load() -> Figure:
    """Returns what each rank carries with equal bits and with bits that follow the load."""
    ranks, hidden, per_rank = 8, 1024, 4096
    weights = [1 / (rank + 1) ** 0.8 for rank in range(ranks)]
    row = [round(per_rank * w / sum(weights)) for w in weights]
    rows = torch.tensor([row] * ranks)
    codec = RandomQuantization()
    widths = torch.tensor([0, 0, *(_row_bytes(codec, hidden, b) for b in range(2, 9))])
    figure = Figure(figsize=(8, 3.2), facecolor=PAPER)
    axes = figure.add_axes((0.09, 0.15, 0.89, 0.69))
    policies = (("uniform", "6 bits for all", GREY, -0.2), ("optimal", "optimal", BLUE, 0.2))
    for policy, name, colour, shift in policies:
        bits = allocate_bits(rows, policy, target_bits=6, min_bits=3, max_bits=8)
        sent = rows * widths[bits]
        sent.fill_diagonal_(0)
        loads = torch.maximum(sent.sum(0), sent.sum(1)) / 1e6
        places = [rank + shift for rank in range(ranks)]
        label = f"{name}: {most_loaded(sent) / 1e6:.1f} MB on the most loaded rank"
        axes.bar(places, loads.tolist(), 0.38, color=colour, edgecolor=INK, lw=0.6, label=label)
        if policy == "optimal":
            crossing = rows - rows.diagonal().diag()
            means = (crossing * bits).sum(0) / crossing.sum(0)
            for place, height, mean in zip(places, loads.tolist(), means.tolist(), strict=True):
                axes.text(place, height + 0.3, f"{mean:.1f}", ha="center", fontsize=8, color=INK)
    axes.set_xticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    axes.set_ylabel("MB sent or received,\nwhichever is more")
    axes.grid(visible=False, axis="x")
    figure.legend(loc="upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def _row_bytes(codec: Codec, hidden: int, bits: int) -> int:
    sections = codec.sections(hidden, torch.bfloat16, bits)
    return sum(section.row_bytes for section in sections)


def rounding() -> Figure:
    """Returns what values of a row arrive as at 3 bits, and the variance of two codecs."""
    values = torch.linspace(-1, 1, 201)
    rows = torch.cat((values, torch.ones(7))).expand(4096, -1).contiguous()  # scale 1, 208 values
    figure = Figure(figsize=(8, 3.1), facecolor=PAPER)
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.1, right=0.985, bottom=0.16, top=0.89, wspace=0.24)
    arrived = _sent(RandomQuantization(), rows, 3)[:, :201]
    left.plot(values, arrived[0], ".", ms=3, color=BLUE, label="one row")
    left.plot(values, arrived.mean(0), "-", color=ORANGE, lw=1.8, label="mean of 4096 rows")
    left.set(xlabel="value / scale of its row", ylabel="arrives as", title="rq, 3 bits")
    for codec, name, colour in (
        (RandomQuantization(), "rq", BLUE),
        (Dithered(), "dithered", ORANGE),
    ):
        variance = _sent(codec, rows, 3)[:, :201].var(0)
        right.plot(values, variance, color=colour, lw=1.2, label=name)
    right.set(xlabel="value / scale of its row", ylabel="variance", title="error at 3 bits")
    right.set_ylim(0, 0.042)
    for axes in (left, right):
        axes.set_facecolor(PAPER)
        axes.title.set_fontsize(10)
        axes.legend(loc="upper left", fontsize=8.5, ncols=2 if axes is right else 1)
    return figure


def _sent(codec: Codec, rows: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns the rows as they arrive, float64."""
    packet = Packet.plan([Peer(0, bits, codec), Peer(len(rows), bits, codec)], 0, rows)
    random, arrived = RandomStream(1, 2, 3), torch.zeros_like(rows)
    packet.decode(packet.encode(rows, (), random), arrived, (), random)
    return arrived.double()


def clustering() -> Figure:
    """Returns the bytes of the four wires against the rate of clustering."""
    hidden = 1024
    stock = 2 * (2 * hidden + 4) + 2 * 2 * hidden
    rates = [i / 50 for i in range(1, 51)]
    figure = Figure(figsize=(8, 3.1), facecolor=PAPER)
    axes = figure.add_axes((0.09, 0.16, 0.89, 0.8))
    codecs = (
        ("lsh", Identity(), 0, BLUE, "-"),
        ("lsh, rq at 6 bits", RandomQuantization(), 6, ORANGE, "--"),
        ("lsh, rq at 4 bits", RandomQuantization(), 4, GREEN, "-."),
    )
    for name, codec, bits, colour, dashes in codecs:
        # Probabilities stay at home.
        share = 4 * _row_bytes(codec, hidden, bits) / stock
        axes.plot(rates, [rate * share for rate in rates], dashes, color=colour, label=name)
    birdmoe = (4 * _row_bytes(RandomQuantization(), hidden, 6) + 8) / stock
    axes.axhline(birdmoe, color=INK, lw=1, ls=":")
    axes.text(1.0, birdmoe + 0.02, "birdmoe, 6 bits", ha="right", fontsize=8.5, color=INK)
    axes.axvline(0.2, color=FAINT, lw=1)
    axes.text(0.205, 0.72, "default rate", fontsize=8.5, color=INK)
    axes.set(xlim=(0, 1.005), ylim=(0, 1.05))
    axes.set(xlabel="centroids per row", ylabel="bytes over those of bfloat16 rows")
    axes.legend(loc="upper left", fontsize=9, bbox_to_anchor=(0.22, 1.0))
    return figure


FIGURES = {
    "data_path": data_path,
    "message": message,
    "load": load,
    "rounding": rounding,
    "clustering": clustering,
}

if __name__ == "__main__":
    main()
