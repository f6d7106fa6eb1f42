"""The Megatron options of a run without CUDA: what ``add_settings`` sets and what it refuses."""

import argparse
import sys
from collections.abc import Container
from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """A Megatron option whose value a machine without CUDA leaves no choice about."""

    dest: str
    """Name in Megatron's argument namespace."""
    value: object
    flag: str
    """How that value is asked for on the command line."""
    why: str
    """What the other values need."""


@dataclass(frozen=True)
class Refusal:
    """Values of a Megatron option that cannot work without CUDA."""

    dest: str
    """Name in Megatron's argument namespace."""
    values: Container[object]
    why: str
    """What they need."""


SETTINGS = (
    Setting("distributed_backend", "gloo", "--distributed-backend gloo", "CUDA devices"),
    Setting("transformer_impl", "local", "--transformer-impl local", "CUDA kernels"),
    Setting("no_persist_layer_norm", True, "--no-persist-layer-norm", "CUDA kernels of Apex"),
    Setting(
        "gradient_accumulation_fusion",
        False,
        "--no-gradient-accumulation-fusion",
        "CUDA kernels of Apex",
    ),
    Setting("masked_softmax_fusion", False, "--no-masked-softmax-fusion", "CUDA kernels"),
    Setting("apply_rope_fusion", False, "--no-rope-fusion", "Transformer Engine"),
)
"""The options that ``add_settings`` sets; any other value is refused."""

_ANY_TRUE = (True,)
_TRANSFORMER_ENGINE = "a kernel of Transformer Engine"

REFUSALS = (
    Refusal("context_parallel_size", range(2, sys.maxsize), "Transformer Engine's attention"),
    Refusal("multi_latent_attention", _ANY_TRUE, "Transformer Engine's attention"),
    Refusal("moe_grouped_gemm", _ANY_TRUE, _TRANSFORMER_ENGINE),
    Refusal("moe_permute_fusion", _ANY_TRUE, _TRANSFORMER_ENGINE),
    Refusal("moe_token_dispatcher_type", ("flex",), "DeepEP or HybridEP"),
    Refusal("use_precision_aware_optimizer", _ANY_TRUE, "Transformer Engine's optimizer"),
    Refusal("cuda_graph_impl", ("local", "transformer_engine", "full_iteration"), "CUDA graphs"),
)
"""What ``add_settings`` refuses beyond that."""


def add_settings(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Makes ``SETTINGS`` the defaults of Megatron's parser and returns it.

    For use as, or at the end of, an ``extra_args_provider``: it reads the command line, so every
    option must be known to the parser by then.

    Raises:
        ValueError: where the command line contradicts ``SETTINGS`` or meets one of ``REFUSALS``.
    """
    parser.set_defaults(**{setting.dest: setting.value for setting in SETTINGS})
    args, _ = parser.parse_known_args()
    for setting in SETTINGS:
        if getattr(args, setting.dest) != setting.value:
            raise _contradiction(args, setting.dest, setting.why, f"use {setting.flag}")
    for refusal in REFUSALS:
        if getattr(args, refusal.dest) in refusal.values:
            raise _contradiction(args, refusal.dest, refusal.why, "leave it out")
    return parser


def _contradiction(args: argparse.Namespace, dest: str, why: str, remedy: str) -> ValueError:
    option, value = "--" + dest.replace("_", "-"), getattr(args, dest)
    asked = option if value is True else f"{option} {value}"
    return ValueError(
        f"{asked} needs {why}, and no CUDA device is visible: {remedy}, or run where there is one"
    )
