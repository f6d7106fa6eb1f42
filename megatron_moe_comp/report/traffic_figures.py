"""Sections from counted bytes: those of each wire and layer, and those of the most loaded rank."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from matplotlib.ticker import MaxNLocator

from megatron_moe_comp.report.drawing import (
    BAR_HEIGHT,
    BAR_MARGIN,
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
from megatron_moe_comp.report.network_results import STOCK, Case
from megatron_moe_comp.report.quality_results import Runs
from megatron_moe_comp.report.section import Missing, Picture, Section, Table, number

REMEDY = "a training run with `--moe-a2a-stats-json PATH`, or benchmarks/quality.py"
Traffic = Mapping[str, Sequence[Entry]]
"""By name: the statistics of each run, of one or several seeds."""
Load = tuple[float, float | None, float]
"""Bytes of the most loaded rank as float32, with the same bits for all ranks, and as sent."""
LOADS = (("as float32", "o", BLACK), ("same bits for all", "|", COLOURS[0]))
LOADS += (("as sent", "D", COLOURS[1]),)


def collect_traffic(runs: Runs, files: Sequence[tuple[str, Entry]]) -> dict[str, list[Entry]]:
    """Returns the statistics of quality runs, by setting, and those of single files, by file."""
    traffic = {name: [run["stats"] for run in seeds.values()] for name, seeds in runs.items()}
    for stem, statistics in files:
        bits = statistics.get("bits")
        name = f"{statistics['method']}{f' {bits} bit' if bits else ''} ({stem})"
        traffic.setdefault(name, []).append(statistics)
    return {
        name: counted
        for name, entries in traffic.items()
        if (counted := [entry for entry in entries if entry.get("wires")])
    }


def sent(entries: Sequence[Mapping[str, Any]], wire: str | None = None) -> tuple[float, float]:
    """Returns bytes as float32 and bytes sent, of one wire or all: the mean over entries."""

    def total(key: str) -> float:
        return mean(
            sum(counts[key] for name, counts in entry["wires"].items() if wire in (None, name))
            for entry in entries
        )

    return total("raw_bytes"), total("wire_bytes")


def wire_section(traffic: Traffic, styles: Mapping[str, Style]) -> Section | Missing:
    """Returns the bytes of every wire and layer."""
    title = "Bytes of each wire and layer"
    # With a single rank nothing crosses a wire.
    traffic = {name: entries for name, entries in traffic.items() if sent(entries)[0]}
    if not traffic:
        return Missing(title, REMEDY)
    wires = list(next(iter(traffic.values()))[0]["wires"])
    names = list(traffic)
    totals = [sent(entries)[0] for entries in traffic.values()]
    parts = [
        (wire, [100 * sent(traffic[n], wire)[1] / t for n, t in zip(names, totals, strict=True)])
        for wire in wires
    ]
    svg = stacked_bars(names, parts, "bytes sent, % of all wires' bytes as float32")
    text = (
        "Bytes handed to the collective by all ranks in training, scales and probabilities "
        "included; rows that stay on their rank are not sent and not counted. Means over seeds."
    )
    layers = layer_ratios(traffic)
    pictures, tables = [Picture("By wire", svg)], [wire_table(traffic, wires)]
    if any(layers.values()):
        pictures.append(Picture("By layer", draw_layers(layers, styles)))
        tables.append(layer_table(layers))
    return Section(title, text, pictures, tables)


def layer_ratios(traffic: Traffic) -> dict[str, dict[int, float]]:
    """Returns bytes sent over bytes as float32, by name and layer."""
    ratios: dict[str, dict[int, float]] = {}
    for name, entries in traffic.items():
        layers: dict[int, list[Mapping[str, Any]]] = {}
        for figures in (figures for entry in entries for figures in entry.get("layers", ())):
            layers.setdefault(figures["layer"], []).append(figures)
        counted = {layer: sent(group) for layer, group in layers.items()}
        ratios[name] = {layer: wire / raw for layer, (raw, wire) in counted.items() if raw}
    return ratios


def draw_layers(ratios: Mapping[str, Mapping[int, float]], styles: Mapping[str, Style]) -> str:
    """Returns the share that each layer sends as SVG."""
    figure, axes = panel()
    for name, layers in ratios.items():
        shares = [100 * share for share in layers.values()]
        axes.plot(list(layers), shares, label=name, **vars(styles[name]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer")
    axes.set_ylabel("bytes sent, % of float32")
    legend_below(figure, axes, columns=2 if max(map(len, ratios)) > 14 else 3)
    return to_svg(figure)


def wire_table(traffic: Traffic, wires: Sequence[str]) -> Table:
    """Returns MB, ratio and error of each wire."""
    rows = []
    for name, entries in traffic.items():
        for wire in [*wires, None]:
            raw, wire_bytes = sent(entries, wire)
            errors = [entry["wires"][wire].get("sqnr_db") for entry in entries if wire]
            known = [error for error in errors if error is not None]
            ratio = raw / wire_bytes if wire_bytes else None
            sizes = (f"{raw / 1e6:.1f}", f"{wire_bytes / 1e6:.1f}", number(ratio, 2, "x"))
            rows.append((name, wire or "all", *sizes, number(mean(known) if known else None, 1)))
    header = ("setting", "wire", "MB as float32", "MB sent", "ratio", "SQNR (dB)")
    return Table("Bytes of each wire", header, rows, text_columns=2)


def layer_table(ratios: Mapping[str, Mapping[int, float]]) -> Table:
    """Returns the ratio of each layer."""
    layers = sorted({layer for by_layer in ratios.values() for layer in by_layer})
    rows = []
    for name, by_layer in ratios.items():
        shares = [by_layer.get(layer) for layer in layers]
        rows.append((name, *(number(1 / share if share else None, 2, "x") for share in shares)))
    header = ("setting", *(f"layer {layer}" for layer in layers))
    return Table("Bytes as float32 over bytes sent, by layer", header, rows)


def load_section(traffic: Traffic, found: Sequence[Case]) -> Section | Missing:
    """Returns the bytes of the most loaded rank before and after."""
    title = "The most loaded rank"
    groups = {"Training runs": loads_of_statistics(traffic)}
    groups |= {case.name: loads_of_rows(case) for case in found}
    text = (
        "What the rank that all others wait for sends or receives, whichever is more, in one layer "
        "and micro-batch over the four wires: as float32, with the same bits for all ranks, and as "
        "sent."
    )
    section = Section(title, text)
    header = ("setting", "kB as float32", "kB, same bits for all", "kB as sent", "ratio")
    for name, loads in groups.items():
        if loads:
            section.pictures.append(Picture(name, draw_loads(loads)))
            rows = [
                (n, *(number(None if b is None else b / 1e3, 1) for b in load), f"{ratio:.2f}x")
                for n, load in loads.items()
                for ratio in [load[0] / load[2]]
            ]
            section.tables.append(Table(name, header, rows))
    return section if section.pictures else Missing(title, f"{REMEDY}, or benchmarks/network.py")


def loads_of_statistics(traffic: Traffic) -> dict[str, Load]:
    """Returns the mean loads of those that were counted; stock Megatron's are not."""
    loads: dict[str, Load] = {}
    for name, entries in traffic.items():
        counted = [entry["most_loaded_rank"] for entry in entries if entry.get("most_loaded_rank")]
        if counted and all(load["bytes"] for load in counted):
            loads[name] = tuple(
                mean(load[key] for load in counted)
                for key in ("float32_bytes", "uniform_bytes", "bytes")
            )
    return loads


def loads_of_rows(case: Case) -> dict[str, Load]:
    """Returns the loads of each method at the slowest rate, against stock Megatron's there."""
    for rate in case.rates:
        stock = case.by_rate_and_method.get((rate, STOCK), {}).get("most_loaded_bytes")
        rows = [(m, case.by_rate_and_method.get((rate, m))) for m in case.methods]
        if stock:
            loads = {m: row.get("most_loaded_bytes") for m, row in rows if row}
            return {m: (stock, None, load) for m, load in loads.items() if load}
    return {}


def draw_loads(loads: Mapping[str, Load]) -> str:
    """Returns three marks for each name on a line as SVG."""
    figure, axes = panel(BAR_MARGIN + BAR_HEIGHT * len(loads))
    names = list(loads)
    for name, load in loads.items():
        axes.plot([load[2] / 1e3, load[0] / 1e3], [name, name], color=GREY, zorder=1)
    for index, (label, marker, color) in enumerate(LOADS):
        values = [loads[name][index] for name in names]
        points = [(v / 1e3, n) for v, n in zip(values, names, strict=True) if v is not None]
        if points:
            axes.scatter(
                *zip(*points, strict=True),
                marker=marker,
                color=color,
                s=90 if marker == "|" else 30,
                label=label,
                zorder=2,
            )
    axes.invert_yaxis()
    axes.margins(y=0.1)
    axes.set_xlim(left=0)
    axes.set_xlabel("kB per layer and micro-batch")
    legend_below(figure, axes)
    return to_svg(figure)
