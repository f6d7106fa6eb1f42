"""Compares the speed-ups that megatron_moe_comp.plan predicts with those that were measured.

    python benchmarks/plan_accuracy.py rows.json [more.json ...] --held-out-rate 500mbit
    python benchmarks/plan_accuracy.py rows.json --held-out-hidden 384 --json errors.json

Rows are those of benchmarks/network.py. What a machine achieves is fitted on all of them but the
held-out ones: by the times of steps the FLOPS and the memory bandwidth of a core, what a layer
takes whatever its size, the part of a link's rate that arrives, the bandwidth of links without a
rate, the latency of a message and how much longer gloo's own all-to-alls take than ours; by the
times that encoding and decoding took the speed of each codec. More ranks than cores share them.
Messages should be larger than the burst that a shaped link lets through at once.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plan_fit import Fitted, Setting, codec_speeds, fit, setting_of
from rich.console import Console
from rich.table import Table

from megatron_moe_comp.plan.cost_model import CodecSpeed, predict


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints and writes the predictions, the held-out ones apart."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="+", type=Path, metavar="NETWORK_JSON")
    parser.add_argument("--held-out-rate", action="append", default=[], metavar="RATE")
    parser.add_argument("--held-out-hidden", action="append", default=[], type=int, metavar="H")
    parser.add_argument("--json", type=Path, metavar="PATH", help="file to write the result to")
    options = parser.parse_args(arguments)
    rows = [row for path in options.rows for row in json.loads(path.read_text())]
    settings = [setting_of(row) for row in rows]
    held_out = [
        s.row["rate"] in options.held_out_rate or s.model.hidden_size in options.held_out_hidden
        for s in settings
    ]
    if all(held_out):
        parser.error("no row is left to fit the machine on. Hold out fewer of them.")
    wanted = bool(options.held_out_rate or options.held_out_hidden)
    if wanted and not any(held_out):
        parser.error("no row has what is to be held out. Name a rate or hidden size of the rows.")
    fit_on = [s for s, out in zip(settings, held_out, strict=True) if not out]
    codecs = codec_speeds(fit_on)
    used = {wire.codec for s in settings for wire in s.method.traffic[0].wires}
    missing = used - {None, "identity", *codecs}
    if missing:
        parser.error(f"no row to fit on has codec {', '.join(sorted(missing))}. Hold out others.")
    fitted = fit(fit_on, codecs)
    found = [figures(s, out, fitted, codecs) for s, out in zip(settings, held_out, strict=True)]
    report = {
        "fitted": asdict(fitted),
        "codecs": {name: asdict(speed) for name, speed in codecs.items()},
        "errors": {
            name: summary([f for f in found if f["held_out"] == is_out])
            for name, is_out in (("fitted", False), ("held_out", True))
        },
        "rows": found,
    }
    print_report(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def figures(
    s: Setting, held_out: bool, fitted: Fitted, codecs: dict[str, CodecSpeed]
) -> dict[str, Any]:
    """Returns what was measured and what is predicted of a row."""
    ours, stock = (s.seconds(method, fitted, codecs) for method in (s.method, s.stock))
    prediction = predict(s.model, s.layout, s.machine(fitted, codecs), s.method)
    return {
        "ranks": s.row["ranks"],
        "hidden_size": s.model.hidden_size,
        "rate": s.row["rate"],
        "routing": s.row["routing"],
        "method": s.row["method"],
        "held_out": held_out,
        "measured_step_ms": s.row["step_ms"],
        "predicted_step_ms": 1e3 * ours,
        "measured_bytes": s.row["wire_bytes"],
        "predicted_bytes": prediction.wire_bytes * s.layout.ranks,
        "measured_speedup": s.row["speedup"],
        "predicted_speedup": stock / ours,
        "error": stock / ours / s.row["speedup"] - 1,
    }


def summary(found: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Returns median and largest error of the speed-ups, leaving out none's, which is 1."""
    errors = [abs(f["error"]) for f in found if f["method"] != "none"]
    return {"median": statistics.median(errors), "largest": max(errors)} if errors else None


def print_report(report: dict[str, Any]) -> None:
    """Prints the fitted figures, a table and the errors."""
    console = Console(width=120)
    fitted = Fitted(**report["fitted"])
    console.print(
        f"Fitted, of a core: {fitted.flops / 1e9:.3g} GFLOPS, memory "
        f"{fitted.memory_bandwidth / 1e9:.3g} GB/s; links: {fitted.link_efficiency:.0%} of their "
        f"rate, {fitted.free_bandwidth / 1e9:.3g} GB/s without one, {fitted.latency * 1e6:.3g} us "
        f"per message; {fitted.layer_overhead * 1e3:.3g} ms for a layer whatever its size; stock's "
        f"all-to-alls of two ranks take {fitted.stock_transfer:.2f} times as long as ours.",
        highlight=False,
    )
    table = Table(title="Predicted and measured")
    for column in ("ranks", "hidden", "rate", "routing", "method", "held out"):
        table.add_column(column)
    for column in ("step (ms)", "predicted", "speed-up", "predicted", "error"):
        table.add_column(column, justify="right")
    for f in report["rows"]:
        table.add_row(
            *(str(f[key]) for key in ("ranks", "hidden_size", "rate", "routing", "method")),
            "yes" if f["held_out"] else "",
            f"{f['measured_step_ms']:.0f}",
            f"{f['predicted_step_ms']:.0f}",
            f"{f['measured_speedup']:.2f}x",
            f"{f['predicted_speedup']:.2f}x",
            f"{f['error']:+.1%}",
        )
    console.print(table)
    for name, errors in report["errors"].items():
        if errors:
            console.print(
                f"Speed-ups, {name.replace('_', ' ')}: median error {errors['median']:.1%}, "
                f"largest {errors['largest']:.1%}.",
                highlight=False,
            )


if __name__ == "__main__":
    main()
