"""Sections from network rows: speed-up against bandwidth, break-even, step time by phase."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from megatron_moe_comp.report.drawing import (
    BLACK,
    COLOURS,
    GREY,
    Style,
    legend_below,
    panel,
    stacked_bars,
    to_svg,
)
from megatron_moe_comp.report.inputs import Entry
from megatron_moe_comp.report.network_results import (
    PHASES,
    STOCK,
    UNSHAPED,
    Case,
    bits_label,
    break_even,
    rate_bits,
)
from megatron_moe_comp.report.section import Missing, Picture, Section, Table, number, spread

REMEDY = "rows of `python benchmarks/network.py --json PATH` (root, Linux), with method none"
PHASE_COLOURS = (*COLOURS[:2], COLOURS[4], COLOURS[2], GREY)
ROW_HEADER = (
    "rate",
    "method",
    "ms per step (min to max)",
    "speed-up (min to max)",
    "share of gain",
    "MB sent",
    "MB at interfaces",
    "ratio",
)


def speedup_section(found: Sequence[Case], styles: Mapping[str, Style]) -> Section | Missing:
    """Returns the speed-up of every method against bandwidth, with the limit."""
    title = "Speed-up against bandwidth"
    shown = [case for case in found if any(case.compared(m) for m in case.methods)]
    if not shown:
        return Missing(title, REMEDY)
    text = (
        "Step time of Megatron's own all-to-all (none) over that of the method, on the same links "
        "in the same run: median over repeats, bars from the smallest to the largest. The limit is "
        "the speed-up if communication cost nothing: step time of none on these links over that on "
        "unshaped ones. Share of gain: (T_none - T) / (T_none - T_unshaped), where that is worth "
        "10% of a step; above 100% where a method also spares experts work. MB are per step and of "
        "all ranks, the ratio is to float32."
    )
    section = Section(title, text)
    for case in shown:
        section.pictures.append(Picture(case.name, draw_speedups(case, styles)))
        rows = [cells(case, row) for row in in_order(case)]
        section.tables.append(Table(f"{case.name}: all rows", ROW_HEADER, rows, text_columns=2))
    return section


def draw_speedups(case: Case, styles: Mapping[str, Style]) -> str:
    """Returns the speed-ups of a case as SVG."""
    figure, axes = panel()
    places = place_rates(case.rates)
    limits = [(places[rate], limit) for rate in case.rates if (limit := case.limit(rate))]
    if limits:
        axes.plot(*zip(*limits, strict=True), color=GREY, linewidth=5, label="limit", zorder=1)
    axes.axhline(1, color=BLACK, linewidth=1.2, label=STOCK, zorder=1.5)
    for method in case.methods:
        rows = case.compared(method)
        middles = [row["speedup"] for row in rows]
        errors = [
            [row["speedup"] - row.get("speedup_min", row["speedup"]) for row in rows],
            [row.get("speedup_max", row["speedup"]) - row["speedup"] for row in rows],
        ]
        axes.errorbar(
            [places[row["rate"]] for row in rows],
            middles,
            errors,
            elinewidth=0.8,
            label=method,
            **vars(styles[method]),
        )
    axes.set_ylabel("speed-up over none")
    label_rates(axes, places)
    legend_below(figure, axes)
    return to_svg(figure)


def place_rates(rates: Sequence[str]) -> dict[str, float]:
    """Returns where each rate is on the axis: its logarithm; unshaped, one step beyond the last."""
    places = {rate: math.log10(rate_bits(rate)) for rate in rates if rate != UNSHAPED}
    if UNSHAPED in rates:
        last, first = max(places.values(), default=0), min(places.values(), default=0)
        places[UNSHAPED] = last + max(0.3, (last - first) / max(1, len(places) - 1))
    return places


def label_rates(axes: Axes, places: Mapping[str, float]) -> None:
    """Names the measured rates on the horizontal axis."""
    axes.xaxis.set_major_locator(FixedLocator(list(places.values())))
    axes.set_xticklabels([bits_label(rate_bits(rate)).replace(" ", "\n") for rate in places])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("bandwidth of each rank's link")


def in_order(case: Case) -> list[Entry]:
    """Returns its rows, slowest link first, stock Megatron before the others."""
    order = [STOCK, *case.methods]
    return sorted(case.rows, key=lambda row: (rate_bits(row["rate"]), order.index(row["method"])))


def cells(case: Case, row: Entry) -> list[str]:
    """Returns a row as text; stock Megatron's speed-up is the limit's place."""
    limit = case.limit(row["rate"]) if row["method"] == STOCK else None
    speedup = spread(row.get("speedup"), row.get("speedup_min"), row.get("speedup_max"), 2)
    return [
        bits_label(rate_bits(row["rate"])),
        row["method"],
        spread(row["step_ms"], row.get("step_ms_min"), row.get("step_ms_max"), 0),
        f"limit {limit:.2f}" if limit else "1" if row["method"] == STOCK else speedup,
        percent(case.share_of_gain(row)),
        megabytes(row.get("wire_bytes")),
        megabytes(row.get("interface_bytes")),
        number(row.get("ratio"), 2, "x"),
    ]


def percent(share: float | None) -> str:
    """Returns a share in percent."""
    return "-" if share is None else f"{100 * share:.0f}%"


def megabytes(count: float | None) -> str:
    """Returns bytes in MB."""
    return "-" if count is None else f"{count / 1e6:.1f}"


def break_even_section(found: Sequence[Case]) -> Section | Missing:
    """Returns the bandwidths between which each method pays."""
    title = "Where a method pays"
    header = ("method", "pays from", "up to", "remark")
    tables = []
    for case in found:
        rows = []
        for method in case.methods:
            if compared := case.compared(method):
                between = break_even([(row["rate"], row["speedup"]) for row in compared])
                rows.append((method, between.slowest, between.fastest, between.remark))
        if rows:
            tables.append(Table(case.name, header, rows, len(header)))
    if not tables:
        return Missing(title, REMEDY)
    text = (
        "The slowest and the fastest links on which a method's median step is shorter than that of "
        "none. Between two measured bandwidths the place is interpolated: logarithm of the "
        "speed-up, linear in that of the bandwidth."
    )
    return Section(title, text, tables=tables)


def phase_section(found: Sequence[Case]) -> Section | Missing:
    """Returns the step time of every method by phase."""
    title = "Where the time of a step goes"
    section = Section(
        title,
        "Encode and decode are what a method computes, clustering included; transfer is the wait "
        "for the collectives and for slower ranks; experts is their forward and backward "
        "pass; rest is everything else.",
    )
    for case in found:
        for rate in case.rates:
            rows = [r for r in in_order(case) if r["rate"] == rate and r.get("phases")]
            if not rows:
                continue
            name = f"{case.name}, {bits_label(rate_bits(rate))}"
            names = [row["method"] for row in rows]
            phases = [[row["phases"].get(phase) or 0.0 for row in rows] for phase in PHASES]
            parts = list(zip(PHASES, phases, strict=True))
            svg = stacked_bars(names, parts, "ms per step", PHASE_COLOURS)
            section.pictures.append(Picture(name, svg))
            by_method = zip(names, zip(*phases, strict=True), strict=True)
            body = [[method, *(f"{ms:.0f}" for ms in values)] for method, values in by_method]
            section.tables.append(Table(f"{name}: ms per step", ("method", *PHASES), body))
    return section if section.pictures else Missing(title, REMEDY)
