"""--dry-run RANKS: checks the flags of a run and says what it needs, on any machine.

Nothing is built, read or communicated: Megatron validates its arguments as rank 0 of so many, and
the planner's formulas say what a rank holds and sends. Norms and biases are left out of weights.
"""

import io
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import torch
from megatron.training import arguments as megatron_arguments

from megatron_moe_comp.options.codec_options import DEFAULT_BITS
from megatron_moe_comp.options.config import CompressionConfig
from megatron_moe_comp.plan.cost_model import wire_bytes
from megatron_moe_comp.plan.methods import flags_of, method_of, stock_method
from megatron_moe_comp.plan.operations import activation_bytes, weights, weights_per_rank
from megatron_moe_comp.plan.shape import (
    UNKNOWN_VOCAB,
    Layout,
    Model,
    layout_of_args,
    model_of_args,
)
from megatron_moe_comp.training import arguments
from megatron_moe_comp.training.arguments import ArgsProvider

FLAG = "--dry-run"
GPUS_PER_NODE = 8
"""Where --moe-a2a-ranks-per-node does not say."""
ADAM_BYTES, GRADIENT_BYTES, MASTER_BYTES = 8, 4, 4
ASSUMED_CAPABILITY = (9, 0)
"""Compute capability that Megatron is told of where there is no GPU."""


def is_requested() -> bool:
    """Returns whether the command line asks for a dry run."""
    return any(word.split("=")[0] == FLAG for word in sys.argv[1:])


def add_dry_run_args(parser: ArgumentParser) -> ArgumentParser:
    """Adds the flag to Megatron's parser and returns it."""
    parser.add_argument(
        FLAG,
        type=int,
        metavar="RANKS",
        help="train nothing: validate the flags for so many ranks and print weights, memory and "
        "bytes of a rank",
    )
    return parser


def main(*extra_args_providers: ArgsProvider) -> None:
    """Validates the command line as that of the first of so many ranks, and prints the report.

    Args:
        extra_args_providers: of the script's own flags.

    Raises:
        ValueError: options that do not go together.
        AssertionError: Megatron's own checks.
    """
    provider = arguments.with_our_flags(add_dry_run_args, *extra_args_providers)
    ranks = megatron_arguments.parse_args(provider).dry_run
    if ranks < 1:
        raise ValueError(f"{FLAG}={ranks}: not a number of ranks. Use 1 or more.")
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(ranks))
    args = megatron_arguments.parse_args(provider)
    arguments.check_unvalidated(args)
    # Megatron prints every argument.
    with _without_gpu(), redirect_stdout(io.StringIO()):
        megatron_arguments.validate_args(args, {})
    print(report(args, arguments.compression_config_from_args(args)), flush=True)


@contextmanager
def _without_gpu() -> Iterator[None]:
    """Has Megatron's validation find a GPU where there is none."""
    original = torch.cuda.get_device_capability
    if not torch.cuda.is_available():
        torch.cuda.get_device_capability = lambda device=None: ASSUMED_CAPABILITY
    try:
        yield
    finally:
        torch.cuda.get_device_capability = original


def report(args: Namespace, config: CompressionConfig) -> str:
    """Returns what a run of validated arguments needs, as lines of text.

    Args:
        args: Megatron's, validated.
        config: options of the all-to-alls.
    """
    ranks_per_node = config.moe_a2a_ranks_per_node or GPUS_PER_NODE
    layout = layout_of_args(args, args.world_size, ranks_per_node, load=1.0)
    model = model_of_args(args, layout)
    all_dense, all_expert = weights(model)
    active = all_dense + all_expert * model.topk / model.num_experts
    dense, expert = weights_per_rank(model, layout)
    state = _state_bytes(args, dense, expert)
    activations = activation_bytes(model, layout)
    lines = [
        f"{args.world_size} ranks: tensor {layout.tensor_parallel}, pipeline "
        f"{layout.pipeline_parallel}, context {layout.context_parallel}, data "
        f"{args.data_parallel_size}, expert {layout.expert_parallel} x "
        f"{layout.expert_tensor_parallel} parallel. Micro-batches of a step: "
        f"{model.num_microbatches}, with {model.micro_batch_size} samples each.",
        f"Weights: {_count(all_dense + all_expert)}, {_count(active)} of them for each token; on a "
        f"rank {_count(dense + expert)}, {_count(expert)} of them of experts.",
        f"Memory of a rank: {(state + activations) / 1e9:.1f} GB; weights, gradients and optimizer "
        f"{state / 1e9:.1f}, activations about {activations / 1e9:.1f}.",
        _wire_line(model, layout, config),
    ]
    if model.vocab_size == UNKNOWN_VOCAB:
        lines.append(f"The tokenizer was not read: a vocabulary of {UNKNOWN_VOCAB} is assumed.")
    return "\n".join(lines)


def _count(number: float) -> str:
    return f"{number / 1e9:.3f} billion" if number >= 1e9 else f"{number / 1e6:.4g} million"


def _state_bytes(args: Namespace, dense: float, expert: float) -> float:
    """Returns the bytes of weights, float32 gradients and Adam's state of a rank."""
    half = args.bf16 or args.fp16
    kept = (2 if half else 4) + GRADIENT_BYTES
    optimizer = ADAM_BYTES + (MASTER_BYTES if half else 0)
    replicas = (args.data_parallel_size * args.context_parallel_size, _expert_replicas(args))
    if not args.use_distributed_optimizer:
        replicas = (1, 1)
    return sum(
        number * (kept + optimizer / shards)
        for number, shards in zip((dense, expert), replicas, strict=True)
    )


def _expert_replicas(args: Namespace) -> int:
    shards = args.expert_model_parallel_size * args.expert_tensor_parallel_size
    return args.world_size // (shards * args.pipeline_model_parallel_size)


def _wire_line(model: Model, layout: Layout, config: CompressionConfig) -> str:
    """Returns what a rank sends in a step, by stock and as configured."""
    if config.moe_a2a_compress == "auto":
        config = config.resolved(config.moe_a2a_bits or DEFAULT_BITS)
    stock = wire_bytes(model, layout, stock_method(model, layout))
    if not stock:
        return "All experts are on every rank: there is no all-to-all."
    start = f"Experts' all-to-alls, a rank and step at balanced load: {stock / 1e6:.1f} MB as stock"
    if not config.enabled:
        return f"{start} ({model.dtype})."
    ours = wire_bytes(model, layout, method_of("", config, model, layout))
    flags = " ".join(flags_of(config))
    return f"{start} ({model.dtype}), {ours / 1e6:.1f} MB with {flags}: {stock / ours:.2f}x fewer."
