"""What machine explains measured training steps best: the planner's cost model fitted to rows.

Rows are those of benchmarks/network.py.
"""

import math
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch
from methods import METHODS

from megatron_moe_comp.options.config import CompressionConfig
from megatron_moe_comp.plan.cost_model import CodecSpeed, Link, Machine, Method, predict
from megatron_moe_comp.plan.methods import method_of, stock_method
from megatron_moe_comp.plan.shape import Layout, Model, Stack
from megatron_moe_comp.report.network_results import rate_bits
from megatron_moe_comp.training.arguments import add_compression_args

Row = dict[str, Any]

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
    stock_transfer: float = 1.5
    """How long stock's all-to-alls of two ranks take over ours of the same bytes: gloo has a pair
    of ranks send one way at a time, and of more ranks other pairs use what one leaves idle."""


LIMITS = {
    "memory_bandwidth": (1e9, 1e11),
    "link_efficiency": (0.1, 1.0),
    "free_bandwidth": (1e7, 1e11),
    "latency": (1e-6, 1e-2),
    "layer_overhead": (1e-6, 1.0),
    "stock_transfer": (1.0, 3.0),
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
    rate: float
    """Bytes per second of a link; infinity: no limit."""

    def machine(self, fitted: Fitted, codecs: dict[str, CodecSpeed]) -> Machine:
        """Returns what a rank of this setting achieves."""
        bandwidth = min(fitted.link_efficiency * self.rate, fitted.free_bandwidth)
        link = Link(bandwidth, fitted.latency)
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
        if method is self.stock:
            method = method.scaled(1 + (fitted.stock_transfer - 1) / (self.layout.ranks - 1))
        step = predict(self.model, self.layout, self.machine(fitted, codecs), method).step
        return overhead + step


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
    return Setting(row, model, layout, config, method, stock, share, rate_bits(row["rate"]) / 8)


@cache
def config_of(method: str) -> CompressionConfig:
    """Returns the configuration that a method's flags ask for."""
    args = add_compression_args(ArgumentParser()).parse_args(METHODS[method])
    return CompressionConfig(**vars(args) | {"moe_a2a_wires": tuple(args.moe_a2a_wires)})


def codec_speeds(settings: Sequence[Setting]) -> dict[str, CodecSpeed]:
    """Returns each codec's values per second of a core, from the times of its phases.

    Those of lsh hold clustering, too, and tell nothing of its codec.
    """
    sums: dict[str, dict[str, float]] = {}
    for s in settings:
        if not s.config.enabled or s.config.moe_a2a_compress == "lsh":
            continue
        uses = s.model.stacks[0].num_moe_layers * s.model.num_microbatches * s.core_share
        wires = s.method.traffic[0].wires
        # Phases are means over ranks, of which only one has more than the mean load.
        values = [uses * min(wire.encoded, wire.decoded) for wire in wires]
        for wire, of_wire in zip(wires, values, strict=True):
            kinds = ("encode", "decode", "values")
            total = sums.setdefault(wire.codec, dict.fromkeys(kinds, 0.0))
            total["values"] += of_wire
            for phase in kinds[:2]:
                seconds = s.row["phases"][phase] / 1e3 * s.core_share**2
                total[phase] += seconds * of_wire / sum(values)
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
