"""Tables of what the planner predicts for published models, for the documentation."""

import math
from collections.abc import Sequence

from megatron_moe_comp.options.config import CompressionConfig
from megatron_moe_comp.plan import presets
from megatron_moe_comp.plan.break_even import break_even_bandwidth
from megatron_moe_comp.plan.cost_model import Link, Machine, Method
from megatron_moe_comp.plan.methods import (
    MIN_SPEEDUP,
    choose,
    method_of,
    predict_all,
    safe_configs,
    stock_method,
)
from megatron_moe_comp.plan.shape import Layout, Model

RANKS, RANKS_PER_NODE = 64, 8
LATENCY_S = presets.NETWORKS[presets.DEFAULT_NETWORK][2].latency
SPEEDUPS = (MIN_SPEEDUP, 1.1, 1.25, 1.5, 2.0)
GBIT_PER_RANK = (5, 12.5, 25, 50, 100, 200, 400, 800)
"""Of a rank, between nodes: 100 Gbit/s shared by a node of eight is 12.5."""


def break_even_table() -> tuple[list[str], list[list[str]]]:
    """Returns header and rows: up to which link 6 bits of birdmoe reach a speed-up."""
    rows = []
    for name, model in presets.MODELS.items():
        stock, candidates = _methods(model)
        found = _layout(model), _machine(model, 100), stock, candidates[-1]
        limits = [break_even_bandwidth(model, *found, speedup) for speedup in SPEEDUPS]
        rows.append([name, *map(_gbit, limits)])
    return ["6 bits reach, up to", *(f"{speedup:g}x" for speedup in SPEEDUPS)], rows


def _gbit(bandwidth: float) -> str:
    if math.isinf(bandwidth):
        return "any link"
    return f"{bandwidth / presets.GBIT:.0f} Gbit/s" if bandwidth else "never"


def speedup_table() -> tuple[list[str], list[list[str]]]:
    """Returns header and rows: what a plan recommends on each link, and what it predicts."""
    rows = [
        [f"{rate:g} Gbit/s", *(_cell(model, rate) for model in presets.MODELS.values())]
        for rate in GBIT_PER_RANK
    ]
    return ["a GPU's link between nodes", *presets.MODELS], rows


def _cell(model: Model, gbit: float) -> str:
    """Returns "method speed-up (share of the all-to-alls without it)"."""
    stock, candidates = _methods(model)
    predictions = predict_all(model, _layout(model), _machine(model, gbit), [stock, *candidates])
    choice = choose(predictions[0], predictions[1:])
    share = f"({predictions[0].share:.0%})"
    if choice.index is None:
        return f"none {share}"
    return f"{candidates[choice.index].name} {choice.speedup:.2f}x {share}"


def _methods(model: Model) -> tuple[Method, Sequence[Method]]:
    """Returns stock's and what `auto` chooses among, the most exact first."""
    layout = _layout(model)
    configs = safe_configs(CompressionConfig(moe_a2a_compress="auto"), layout)
    named = [method_of(f"{c.moe_a2a_bits} bits", c, model, layout) for c in configs]
    return stock_method(model, layout), named


def _layout(model: Model) -> Layout:
    return presets.layout_of(model, RANKS, RANKS_PER_NODE)


def _machine(model: Model, gbit: float) -> Machine:
    far = Link(gbit * presets.GBIT, LATENCY_S)
    return presets.machine_of(presets.NVLINK, far, model.value_bytes)
