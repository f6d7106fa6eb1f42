"""Predicts what compressing the expert all-to-all does to the time of a training step.

    python -m megatron_moe_comp.plan --ranks 64 --expert-parallel 16 --inter-bandwidth 12.5
    python -m megatron_moe_comp.plan --ranks 64 -- pretrain_gpt_moe.py --num-layers 24 ...
    torchrun --nproc-per-node 2 -m megatron_moe_comp.plan --measure -- pretrain_gpt_moe.py ...
    python -m megatron_moe_comp.plan --table

Flags of a Megatron command are parsed, not validated, and nothing is built. Bandwidths are those
that a rank achieves with all others communicating, not the links' nominal ones.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_moe_comp.comm.link_timing import (
    group_of_consecutive_ranks,
    is_first_rank,
    num_ranks,
    start_ranks,
    stop_ranks,
)
from megatron_moe_comp.options.config import CompressionConfig
from megatron_moe_comp.plan import presets
from megatron_moe_comp.plan.cost_model import Link, Machine
from megatron_moe_comp.plan.measure import measure_machine
from megatron_moe_comp.plan.report import Plan, as_json, make_plan, print_plan
from megatron_moe_comp.plan.shape import (
    VALUE_BYTES,
    Layout,
    Model,
    Stack,
    layout_of_args,
    model_of_args,
)

MEASURED_CODECS = ("rq", "dithered", "gaussian", "identity", "bf16", "fp8", "mxfp8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the plan that the command line asks for, and writes the JSON file."""
    parser = make_parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    options, command = parser.parse_args(words[: _end(words)]), words[_end(words) + 1 :]
    if options.table:
        found: object = print_speedups()
    else:
        try:
            plan, base = plan_of(options, command)
        except ValueError as error:
            parser.error(str(error))
        if plan is None:
            return
        print_plan(plan, base)
        found = as_json(plan, base)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


def _end(words: list[str]) -> int:
    """Returns where our own flags end."""
    return words.index("--") if "--" in words else len(words)


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of what comes before `--`."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_moe_comp.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--table", action="store_true", help="speed-ups of published models up to 4096 GPUs")
    add("--json", metavar="PATH", help="file to write the plan to")
    add("--allow-lossy", action="store_true", help="recommend what changes training, too")
    add("--measure", action="store_true", help="measure this machine; start it with torchrun")
    group = parser.add_argument_group("ranks")
    add = group.add_argument
    add("--ranks", type=int, help="default: torchrun's with --measure, else 8")
    add("--expert-parallel", type=int, default=8, help="ranks that share the experts (default: 8)")
    add("--ranks-per-node", type=int, default=8, help="default: 8")
    add("--load", type=float, default=1.0, help="rows of the most loaded rank over the mean")
    group = parser.add_argument_group("machine, of a rank; defaults: an H100, 400 Gbit/s each")
    add, near, far = (
        group.add_argument,
        presets.NVLINK,
        presets.NETWORKS[presets.DEFAULT_NETWORK][2],
    )
    add("--intra-bandwidth", type=float, default=near.bandwidth / 1e9, help="GB/s, in a node")
    add("--intra-latency", type=float, default=near.latency * 1e6, help="us per message")
    add("--inter-bandwidth", type=float, default=far.bandwidth / 1e9, help="GB/s, between nodes")
    add("--inter-latency", type=float, default=far.latency * 1e6, help="us per message")
    add("--tflops", type=float, default=presets.FLOPS / 1e12, help="achieved, not the peak")
    add("--memory-bandwidth", type=float, default=presets.MEMORY_BANDWIDTH / 1e9, help="GB/s")
    share = "GB/s of rows that rq encodes or decodes over the memory bandwidth"
    add("--codec-share", type=float, default=presets.CODEC_SHARE, help=f"assumed: {share}")
    group = parser.add_argument_group("model; not beside a Megatron command")
    add = group.add_argument
    add("--hidden-size", type=int, default=2048)
    add("--ffn-hidden-size", type=int, help="default: 4 times the hidden size")
    add("--moe-ffn-hidden-size", type=int, help="default: as --ffn-hidden-size")
    add("--layers", type=int, default=24)
    add("--moe-layers", type=int, help="default: all")
    add("--experts", type=int, default=32)
    add("--topk", type=int, default=2)
    add("--seq-length", type=int, default=2048)
    add("--micro-batch-size", type=int, default=4)
    add("--num-microbatches", type=int, default=8)
    add("--dtype", choices=VALUE_BYTES, default="bfloat16", help="of the rows")
    add("--vocab-size", type=int, default=50304)
    add("--gated", action="store_true", help="SwiGLU: three matrices in a feed-forward")
    add("--moe-a2a-chunks", type=int, default=1)
    add("--moe-a2a-dedup", action="store_true")
    return parser


def plan_of(
    options: argparse.Namespace, command: Sequence[str]
) -> tuple[Plan | None, CompressionConfig]:
    """Returns the plan, on rank 0 alone if it is measured, and what all its methods share.

    Raises:
        ValueError: options that do not go together.
    """
    device = start_ranks() if options.measure else None
    try:
        ranks = options.ranks or (num_ranks() if options.measure else 8)
        if options.measure and ranks != num_ranks():
            raise ValueError(
                f"--ranks={ranks}: with --measure there are the {num_ranks()} that torchrun "
                "started. Drop --ranks, or --measure."
            )
        model, layout, base = subject_of(options, command, ranks)
        if device is None:
            machine = machine_of(options, model)
        else:
            group = group_of_consecutive_ranks(layout.expert_parallel)
            machine = measure_machine(model, layout, group, device, MEASURED_CODECS)
            if not is_first_rank():
                return None, base
        return make_plan(base, model, layout, machine, allow_lossy=options.allow_lossy), base
    finally:
        if options.measure:
            stop_ranks()


def subject_of(
    options: argparse.Namespace, command: Sequence[str], ranks: int
) -> tuple[Model, Layout, CompressionConfig]:
    """Returns what the plan is for, from our own flags or from those of a Megatron command."""
    if command:
        # Importing Megatron takes 6 s, which nothing else here needs.
        from megatron_moe_comp.training.arguments import parse_command, plan_base_of_args

        args = parse_command(command)
        args.world_size = ranks
        layout = layout_of_args(args, ranks, options.ranks_per_node, options.load)
        return model_of_args(args, layout), layout, plan_base_of_args(args)
    layout = Layout(ranks, options.expert_parallel, options.ranks_per_node, load=options.load)
    ffn = options.ffn_hidden_size or 4 * options.hidden_size
    moe_layers = options.layers if options.moe_layers is None else options.moe_layers
    model = Model(
        (Stack(options.layers, moe_layers, options.seq_length),),
        options.hidden_size,
        ffn,
        options.moe_ffn_hidden_size or ffn,
        options.experts,
        options.topk,
        options.micro_batch_size,
        options.num_microbatches,
        dtype=options.dtype,
        vocab_size=options.vocab_size,
        gated=options.gated,
    )
    base = CompressionConfig(
        moe_a2a_compress="auto",
        moe_a2a_chunks=options.moe_a2a_chunks,
        moe_a2a_dedup=options.moe_a2a_dedup,
    )
    return model, layout, base


def machine_of(options: argparse.Namespace, model: Model) -> Machine:
    """Returns the machine that the flags describe."""
    for name in ("intra_bandwidth", "inter_bandwidth", "tflops", "memory_bandwidth", "codec_share"):
        if not getattr(options, name) > 0:
            raise ValueError(
                f"--{name.replace('_', '-')}={getattr(options, name)}: nothing would ever end. "
                "Use a value above 0."
            )
    memory = options.memory_bandwidth * 1e9
    return Machine(
        flops=options.tflops * 1e12,
        memory_bandwidth=memory,
        near=Link(options.intra_bandwidth * 1e9, options.intra_latency / 1e6),
        far=Link(options.inter_bandwidth * 1e9, options.inter_latency / 1e6),
        codecs=presets.codec_speeds(memory, model.value_bytes, options.codec_share),
    )


def print_speedups() -> list[dict[str, object]]:
    """Prints the predicted speed-ups of published models; returns the rows of the table."""
    console = Console(width=120)
    rows = []
    for name, model in presets.MODELS.items():
        table = Table(title=f"{name}: predicted speed-up of a step (share of the all-to-alls)")
        table.add_column("network")
        for ranks in presets.TABLE_RANKS:
            table.add_column(f"{ranks} GPUs", justify="right")
        for network, (per_node, near, far) in presets.NETWORKS.items():
            cells = []
            for ranks in presets.TABLE_RANKS:
                row = _speedup(model, ranks, per_node, near, far)
                rows.append({"model": name, "network": network, "ranks": ranks} | row)
                cells.append(f"{row['method']} {row['speedup']:.2f}x ({row['share']:.0%})")
            table.add_row(network, *cells)
        console.print(table)
    console.print(presets.ASSUMPTIONS, highlight=False)
    return rows


def _speedup(
    model: Model, ranks: int, per_node: int, near: Link, far: Link
) -> dict[str, str | float]:
    layout = presets.layout_of(model, ranks, per_node)
    machine = presets.machine_of(near, far, model.value_bytes)
    base = CompressionConfig(moe_a2a_compress="auto")
    plan = make_plan(base, model, layout, machine, allow_lossy=False)
    best = plan.rows[plan.recommended]
    share = plan.rows[0].prediction.share
    return {"method": best.method.name, "speedup": best.speedup, "share": share}


if __name__ == "__main__":
    main()
