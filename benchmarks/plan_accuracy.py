"""Compares the speed-ups that megatron_moe_comp.plan predicts with those that were measured.

    python benchmarks/plan_accuracy.py rows.json [more.json ...] --held-out-rate 500mbit
    python benchmarks/plan_accuracy.py rows.json --held-out-hidden 384 --json errors.json

Rows are those of benchmarks/network.py. What a machine achieves is fitted on all of them but the
held-out ones: by the times of steps the FLOPS and the memory bandwidth of a core, what a layer
takes whatever its size, the part of a link's rate that arrives, the bandwidth of links without a
rate and the latency of a message; by the times that encoding and decoding took the speed of each
codec. More ranks than cores share them. Messages should be larger than the burst that a shaped link
lets through at once.
"""

import argparse
import json
import math
import re
import statistics
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from methods import METHODS
from rich.console import Console
from rich.table import Table

from megatron_moe_comp.config import CompressionConfig
from megatron_moe_comp.mcore.arguments import add_compression_args
from megatron_moe_comp.plan.cost_model import CodecSpeed, Link, Machine, Method, predict
from megatron_moe_comp.plan.methods import method_of, stock_method
from megatron_moe_comp.plan.shape import Layout, Model, Stack

Row = dict[str, Any]

UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
UNLIMITED = "none"
FIT_STEPS = 15
SHIFT = 1e-4
"""Of a logarithm, to tell a slope."""
PULL = 1e-3
"""How much a figure that is off by a factor of e counts, beside a row that is."""


@dataclass(frozen=True)
class Fitted:
    """What a core and a link achieve."""

    flops: float = 5e10
    memory_bandwidth: float = 1e10
    link_efficiency: float = 0.9
    free_bandwidth: float = 1e9
    latency: float = 1e-4
    layer_overhead: float = 1e-3
    """Seconds of a core for each layer and micro-batch."""


LIMITS = {
    "memory_bandwidth": (1e9, 1e11),
    "link_efficiency": (0.1, 1.0),
    "free_bandwidth": (1e7, 1e11),
    "latency": (1e-6, 1e-2),
    "layer_overhead": (1e-6, 1.0),
}
"""What the fit may make of figures that rows say little about."""


@dataclass(frozen=True)
class Setting:
    """A row as the cost model takes it."""

    row: Row
    model: Model
    layout: Layout
    config: CompressionConfig
    method: Method
    stock: Method
    core_share: float
    """Of a core, for each rank."""
    rate: float | None
    """Bytes per second of a link; None: no limit."""

    def machine(self, fitted: Fitted, codecs: dict[str, CodecSpeed]) -> Machine:
        """Returns what a rank of this setting achieves."""
        bandwidth = fitted.link_efficiency * self.rate if self.rate else fitted.free_bandwidth
        link = Link(min(bandwidth, fitted.free_bandwidth), fitted.latency)
        memory = fitted.memory_bandwidth
        copies = CodecSpeed(*2 * [memory / (2 * self.model.value_bytes)])
        speeds = {"identity": copies} | codecs
        return Machine(
            fitted.flops * self.core_share,
            memory * self.core_share,
            link,
            link,
            {
                name: replace(
                    s, encode=s.encode * self.core_share, decode=s.decode * self.core_share
                )
                for name, s in speeds.items()
            },
        )

    def seconds(self, method: Method, fitted: Fitted, codecs: dict[str, CodecSpeed]) -> float:
        """Returns the predicted time of a step."""
        layers = self.model.stacks[0].num_layers * self.model.num_microbatches
        overhead = layers * fitted.layer_overhead / self.core_share
        step = predict(self.model, self.layout, self.machine(fitted, codecs), method).step
        return overhead + step


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
    missing = {s.method.traffic[0].wires[0].codec for s in settings} - {None, "identity", *codecs}
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


def setting_of(row: Row) -> Setting:
    """Returns a row of benchmarks/network.py as the cost model takes it."""
    sizes = row["model"]
    model = Model(
        (Stack(sizes["num_layers"], sizes["num_layers"], sizes["seq_length"]),),
        sizes["hidden_size"],
        sizes["ffn_hidden_size"],
        sizes["ffn_hidden_size"],
        sizes["num_experts"],
        sizes["top_k"],
        sizes["micro_batch_size"],
        sizes["num_microbatches"],
        dtype="float32",
        vocab_size=sizes["vocabulary"],
        gated=True,
    )
    ranks, load = row["ranks"], row["load_max_over_mean"]["ranks"]
    layout = Layout(ranks, ranks, 1, load=max(1.0, load))
    config = config_of(row["method"])
    if row.get("lsh_rate"):
        config = replace(config, moe_lsh_target_rate=row["lsh_rate"])
    stock = stock_method(model, layout)
    method = method_of(row["method"], config, model, layout) if config.enabled else stock
    cores = int(row["cpu"].split(" x ")[0])
    share = min(1.0, cores / ranks)
    return Setting(row, model, layout, config, method, stock, share, bytes_per_second(row["rate"]))


@cache
def config_of(method: str) -> CompressionConfig:
    """Returns the configuration that a method's flags ask for."""
    args = add_compression_args(ArgumentParser()).parse_args(METHODS[method])
    return CompressionConfig(**vars(args) | {"moe_a2a_wires": tuple(args.moe_a2a_wires)})


def bytes_per_second(rate: str) -> float | None:
    """Returns what tc's rate stands for; None without a limit."""
    if rate == UNLIMITED:
        return None
    number, unit = re.fullmatch(r"([\d.]+)([a-z]+)", rate).groups()
    return float(number) * UNITS[unit] / 8


def codec_speeds(settings: Sequence[Setting]) -> dict[str, CodecSpeed]:
    """Returns each codec's values per second of a core, from the times of its phases.

    Those of lsh hold clustering, too, and tell nothing of its codec.
    """
    sums: dict[str, dict[str, float]] = {}
    for s in settings:
        wires, codec = s.method.traffic[0].wires, s.config.codec
        if not s.config.enabled or s.config.moe_a2a_compress == "lsh":
            continue
        uses = s.model.stacks[0].num_moe_layers * s.model.num_microbatches * s.core_share
        total = sums.setdefault(codec, dict.fromkeys(("encode", "decode", "values"), 0.0))
        # Phases are means over ranks, of which only one has more than the mean load.
        total["values"] += uses * sum(min(wire.encoded, wire.decoded) for wire in wires)
        for phase in ("encode", "decode"):
            total[phase] += s.row["phases"][phase] / 1e3 * s.core_share**2
    return {
        name: CodecSpeed(t["values"] / t["encode"], t["values"] / t["decode"])
        for name, t in sums.items()
    }


def fit(settings: Sequence[Setting], codecs: dict[str, CodecSpeed]) -> Fitted:
    """Returns the figures with the least mean square of the logarithms of predicted / measured.

    By Levenberg's method on the figures' logarithms, held weakly where they are supposed to be.
    """
    supposed = torch.tensor(list(asdict(Fitted()).values()), dtype=torch.float64).log()

    def residuals(logs: torch.Tensor) -> torch.Tensor:
        fitted = _fitted(logs)
        of_rows = [
            math.log(1e3 * s.seconds(s.method, fitted, codecs) / s.row["step_ms"]) for s in settings
        ]
        return torch.cat((torch.tensor(of_rows).double(), PULL * (logs - supposed)))

    logs, damping = supposed, 1.0
    found = residuals(logs)
    for _ in range(FIT_STEPS):
        shifts = SHIFT * torch.eye(len(logs), dtype=torch.float64)
        slopes = torch.stack([(residuals(logs + s) - found) / SHIFT for s in shifts], dim=1)
        system = torch.cat((slopes, damping * torch.eye(len(logs), dtype=torch.float64)))
        target = torch.cat((-found, torch.zeros_like(logs)))
        tried = logs + torch.linalg.lstsq(system, target[:, None]).solution[:, 0]
        better = residuals(tried)
        if better.square().sum() < found.square().sum():
            logs, found, damping = tried, better, damping / 3
        else:
            damping *= 3
    return _fitted(logs)


def _fitted(logs: torch.Tensor) -> Fitted:
    values = dict(zip(asdict(Fitted()), logs.exp().tolist(), strict=True))
    for name, (low, high) in LIMITS.items():
        values[name] = min(high, max(low, values[name]))
    return Fitted(**values)


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
        f"per message; {fitted.layer_overhead * 1e3:.3g} ms for a layer whatever its size.",
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
