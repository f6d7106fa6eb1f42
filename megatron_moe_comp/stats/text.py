"""What the console says of CommStats: the method, a line per log interval, and the summary."""

from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_moe_comp.compression.wires import WIRES
from megatron_moe_comp.options.config import CompressionConfig

MEGABYTE = 1e6


def describe(compression: CompressionConfig) -> str:
    """Returns the method, its bits and what else changes the traffic, in a few words."""
    if not compression.enabled:
        return "none"
    words = [compression.moe_a2a_compress]
    if compression.moe_a2a_codec is not None:
        words.append(compression.moe_a2a_codec)
    if compression.moe_a2a_bits is not None:
        words.append(f"{compression.moe_a2a_bits} bit")
        if compression.backward != compression.forward:
            words.append(f"({compression.backward.codec} {compression.backward.bits} bit backward)")
        if compression.moe_a2a_bit_policy != "uniform":
            words.append(compression.moe_a2a_bit_policy)
    if compression.moe_a2a_scope != "remote":
        words.append(compression.moe_a2a_scope)
    if compression.moe_a2a_dedup:
        words.append("dedup")
    return " ".join(words)


def interval_line(record: dict[str, Any]) -> str:
    """Returns the line of an interval in which something crossed a wire.

    Args:
        record: see `StatsLogger`.
    """
    sent, raw = (record[key] / MEGABYTE for key in ("wire_bytes", "raw_bytes"))
    measured = {w: r["sqnr_db"] for w, r in record["wires"].items() if r["sqnr_db"] is not None}
    sqnr = "".join(f" {wire} {value:.1f}" for wire, value in measured.items())
    lsh = record["lsh"]
    return (
        f" all-to-all {record['setting']} | iteration {record['iteration']:8d} | "
        f"MB per iteration: {sent:.3f} of {raw:.3f} as float32 ({record['ratio_fp32']:.2f}x) |"
        + (f" LSH rate {lsh['rate']:.3f} |" if lsh and lsh["rows"] else "")
        + (f" SQNR (dB):{sqnr} |" if sqnr else "")
    )


def print_summary(report: dict[str, Any], compression: CompressionConfig) -> None:
    """Prints the report of a training, see `comm_stats.summarize`, as tables."""
    if report["ratio_fp32"] is None:
        print("Expert all-to-all: nothing crossed a wire in training.", flush=True)
        return
    table = Table(title=f"Expert all-to-all, {describe(compression)}, training, all ranks")
    table.add_column("wire / layer")
    for column in ("as float32 (MB)", "sent (MB)", "ratio", "SQNR (dB)"):
        table.add_column(column, justify="right")
    rows = list(report["wires"].items())
    rows += [(layer["name"], _sum_wires(layer["wires"])) for layer in report["layers"]]
    rows.append(("all", _sum_wires(report["wires"])))
    for name, wire in rows:
        raw, sent, sqnr = wire["raw_bytes"], wire["wire_bytes"], wire["sqnr_db"]
        table.add_row(
            name,
            f"{raw / MEGABYTE:.2f}",
            f"{sent / MEGABYTE:.2f}",
            f"{raw / sent:.2f}x" if sent else "",
            f"{sqnr:.1f}" if sqnr is not None else "",
            end_section=name in (WIRES[-1], report["layers"][-1]["name"]),
        )
    Console(width=100).print(table)
    for what in ("rank", "node"):
        if load := report[f"most_loaded_{what}"]:
            raw, uniform, sent = (value / 1e3 for value in load.values())
            print(
                f"Most loaded {what}, per layer and micro-batch: {raw:.1f} kB as float32, "
                f"{uniform:.1f} kB with the same bits for all, {sent:.1f} kB as sent."
            )
    lsh = report["lsh"]
    if lsh and lsh["rows"]:
        residual = lsh["residual_norm"]  # None if no iteration was sampled
        print(
            f"Clustering: {lsh['centroids']} centroids for {lsh['rows']} rows, rate "
            f"{lsh['rate']:.3f}; {lsh['expert_flops_saved']:.3g} expert FLOPs saved"
            + ("." if residual is None else f"; residual {residual:.2f} of a row's norm.")
        )
    if report["mean_bits"] is not None:
        print(f"Mean bits per value: {report['mean_bits']:.2f}.")
    if compression.moe_a2a_dedup:
        saved = 1 - report["rows"] / report["pairs"]
        print(f"Rows shared by several experts of one rank: {saved:.1%} fewer rows sent.")
    print(
        f"Total compression {report['ratio_fp32']:.2f}x against float32, "
        f"{report['ratio_bf16']:.2f}x against bfloat16, over all four wires, scales and "
        "probabilities included.",
        flush=True,
    )


def _sum_wires(wires: dict[str, dict[str, Any]]) -> dict[str, Any]:
    total = {key: sum(w[key] for w in wires.values()) for key in ("raw_bytes", "wire_bytes")}
    return total | {"sqnr_db": None}
