"""What a plan says: predictions of several methods as a table and as JSON, and the advice."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_moe_comp.options.config import CompressionConfig
from megatron_moe_comp.plan.break_even import break_even_bandwidth, break_even_message
from megatron_moe_comp.plan.cost_model import Machine, Method, Prediction
from megatron_moe_comp.plan.methods import (
    SAFE_BITS,
    choose,
    flags_of,
    method_of,
    predict_all,
    safe_configs,
    stock_method,
)
from megatron_moe_comp.plan.shape import Layout, Model

OTHERS: dict[str, dict[str, Any]] = {
    "bf16": {"moe_a2a_compress": "bf16"},
    "fp8": {"moe_a2a_compress": "fp8"},
    "mxfp8": {"moe_a2a_compress": "mxfp8"},
}
"""For comparison; never recommended."""

LOSSY: dict[str, dict[str, Any]] = {
    "birdmoe 4 bit": {
        "moe_a2a_compress": "birdmoe",
        "moe_a2a_bits": 4,
        "moe_a2a_bit_policy": "uniform",
    },
    "birdmoe 3 bit": {
        "moe_a2a_compress": "birdmoe",
        "moe_a2a_bits": 3,
        "moe_a2a_bit_policy": "uniform",
    },
    "lsh 20%": {"moe_a2a_compress": "lsh", "moe_lsh_target_rate": 0.2},
    "lsh 20% rq 4 bit": {
        "moe_a2a_compress": "lsh",
        "moe_lsh_target_rate": 0.2,
        "moe_a2a_codec": "rq",
        "moe_a2a_bits": 4,
    },
}
"""Change training, as README reports; recommended only on request."""

QUALITY = (
    f"Recommended are {max(SAFE_BITS)} to {min(SAFE_BITS)} bits of birdmoe; fewer bits and lsh "
    "(marked *) change training, see README, and are recommended with --allow-lossy only."
)


@dataclass(frozen=True)
class Row:
    """One method."""

    method: Method
    prediction: Prediction
    speedup: float
    pays_below: float
    """Bytes per second; see `break_even_bandwidth`."""
    pays_above: float
    """Bytes of a message; see `break_even_message`."""


@dataclass(frozen=True)
class Plan:
    """Rows, stock's first, and which of them is recommended."""

    model: Model
    layout: Layout
    machine: Machine
    rows: tuple[Row, ...]
    recommended: int
    """0: to compress nothing."""


def make_plan(
    base: CompressionConfig, model: Model, layout: Layout, machine: Machine, *, allow_lossy: bool
) -> Plan:
    """Returns the plan.

    Args:
        base: pieces, scope, wires and shared rows that every method is to have; its method is auto.
        model: to train.
        layout: of its ranks.
        machine: that they run on.
        allow_lossy: whether to recommend what changes training, too.
    """
    safe = [(_name(config), config) for config in safe_configs(base, layout)]
    lossy = [(name, _with(base, options)) for name, options in LOSSY.items()]
    others = [(name, _with(base, options)) for name, options in OTHERS.items()]
    stock = stock_method(model, layout)
    methods = [stock]
    methods += [method_of(name, c, model, layout) for name, c in (*safe, *lossy, *others)]
    predictions = predict_all(model, layout, machine, methods)
    allowed = len(safe) + (len(lossy) if allow_lossy else 0)
    choice = choose(predictions[0], predictions[1 : 1 + allowed])
    rows = tuple(
        Row(
            method,
            prediction,
            predictions[0].step / prediction.step,
            break_even_bandwidth(model, layout, machine, stock, method),
            break_even_message(model, layout, machine, stock, method),
        )
        for method, prediction in zip(methods, predictions, strict=True)
    )
    return Plan(model, layout, machine, rows, 0 if choice.index is None else 1 + choice.index)


def _name(config: CompressionConfig) -> str:
    load_aware = "" if config.moe_a2a_bit_policy == "uniform" else " load-aware"
    return f"{config.moe_a2a_compress} {config.moe_a2a_bits} bit{load_aware}"


def _with(base: CompressionConfig, options: dict[str, Any]) -> CompressionConfig:
    """Returns a method with what of `base` it can have."""
    common = {
        "moe_a2a_wires": base.moe_a2a_wires,
        "moe_a2a_scope": base.moe_a2a_scope,
        "moe_a2a_ranks_per_node": base.moe_a2a_ranks_per_node,
        "moe_a2a_chunks": base.moe_a2a_chunks,
        "moe_a2a_dedup": base.moe_a2a_dedup and options["moe_a2a_compress"] != "lsh",
    }
    return CompressionConfig(**common, **options)


def further_flags(base: CompressionConfig) -> list[str]:
    """Returns the flags that the recommended ones are to be used with."""
    default = CompressionConfig()
    per_node = ["moe_a2a_ranks_per_node"] if base.inter_node_option else []
    flags = [
        f"--{name.replace('_', '-')}={getattr(base, name)}"
        for name in ("moe_a2a_chunks", "moe_a2a_scope", *per_node)
        if getattr(base, name) != getattr(default, name)
    ]
    if base.moe_a2a_wires != default.moe_a2a_wires:
        flags.append("--moe-a2a-wires=" + ",".join(base.moe_a2a_wires))
    return flags + (["--moe-a2a-dedup"] if base.moe_a2a_dedup else [])


def advice(plan: Plan, base: CompressionConfig) -> str:
    """Returns the recommendation in a sentence."""
    row = plan.rows[plan.recommended]
    if plan.recommended == 0:
        fastest = max(r.speedup for r in plan.rows[1:])
        return (
            "Do not compress: use --moe-a2a-compress=none. No recommendable method is predicted to "
            f"be worth it; the fastest of all reaches {fastest:.2f}x."
        )
    flags = " ".join([*row.method.flags, *further_flags(base)])
    return f"Use {flags}: predicted {row.speedup:.2f}x as fast as without compression."


def print_plan(plan: Plan, base: CompressionConfig) -> None:
    """Prints assumptions, table and advice."""
    console = Console(width=120)
    console.print(f"{_of_machine(plan)}\n", highlight=False)
    layout = plan.layout
    link = "between nodes" if layout.far_peers else "within the node"
    table = Table(
        title=f"{layout.ranks} ranks, expert parallel {layout.expert_parallel}; predicted, per step"
    )
    table.add_column("method")
    for column in ("MB sent per rank", "all-to-all (ms)", "share", "step (ms)", "speed-up"):
        table.add_column(column, justify="right")
    table.add_column(f"pays below, {link}", justify="right")
    table.add_column("pays from a message of", justify="right")
    for row in plan.rows:
        prediction = row.prediction
        is_stock = row.method is plan.rows[0].method
        table.add_row(
            row.method.name + (" *" if row.method.alters_training else ""),
            f"{prediction.wire_bytes / 1e6:.1f}",
            f"{prediction.all_to_all * 1e3:.1f}",
            f"{prediction.share:.0%}",
            f"{prediction.step * 1e3:.1f}",
            f"{row.speedup:.2f}x",
            "" if is_stock else _bandwidth(row.pays_below),
            "" if is_stock else _size(row.pays_above),
            style="bold" if row is plan.rows[plan.recommended] else None,
        )
    console.print(table)
    console.print(QUALITY, advice(plan, base), sep="\n", highlight=False)


def _of_machine(plan: Plan) -> str:
    machine, links = plan.machine, []
    for where, peers, link in (
        ("within a node", plan.layout.near_peers, machine.near),
        ("between nodes", plan.layout.far_peers, machine.far),
    ):
        if peers:
            links.append(f"{where} {link.bandwidth / 1e9:.3g} GB/s and {link.latency * 1e6:.3g} us")
    rq = machine.codecs["rq"]
    encode, decode = (r * plan.model.value_bytes / 1e9 for r in (rq.encode, rq.decode))
    return (
        f"A rank: {machine.flops / 1e12:.3g} TFLOPS, memory "
        f"{machine.memory_bandwidth / 1e9:.3g} GB/s, links {', '.join(links) or 'none'}; "
        f"rq encodes {encode:.3g} and decodes {decode:.3g} GB/s of rows and takes "
        f"{rq.message * 1e6:.3g} us for a message. Most loaded rank: {plan.layout.load:.2f} of the "
        "mean rows."
    )


def _bandwidth(value: float) -> str:
    return "never" if value == 0 else "any" if math.isinf(value) else f"{value / 1e9:.3g} GB/s"


def _size(value: float) -> str:
    if value == 0 or math.isinf(value):
        return "any" if value == 0 else "never"
    return f"{value / 1e3:.3g} kB" if value < 1e6 else f"{value / 1e6:.3g} MB"


def as_json(plan: Plan, base: CompressionConfig) -> dict[str, Any]:
    """Returns the plan as JSON values; a break-even that does not exist is None."""
    return {
        "model": asdict(plan.model),
        "layout": asdict(plan.layout),
        "machine": _finite(asdict(plan.machine)),
        "rows": [
            {
                "method": row.method.name,
                "flags": [*row.method.flags],
                "changes_training": row.method.alters_training,
                "speedup": row.speedup,
                "step_s": row.prediction.step,
                "share": row.prediction.share,
                "bytes_per_rank": row.prediction.wire_bytes,
                "seconds": asdict(row.prediction),
                "pays_below_bytes_per_s": _finite(row.pays_below),
                "pays_from_message_bytes": _finite(row.pays_above),
            }
            for row in plan.rows
        ],
        "recommended": plan.rows[plan.recommended].method.name,
        "flags": [*plan.rows[plan.recommended].method.flags, *further_flags(base)]
        if plan.recommended
        else [*flags_of(CompressionConfig())],
        "advice": advice(plan, base),
    }


def _finite(value: Any) -> Any:  # noqa: ANN401
    """Returns JSON's values, None for infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isinf(value) else value
