"""Our command-line flags, generated from CompressionConfig, and what is read back from Megatron.

Together with `checkpoint_start` and the entry scripts this is the only module that sees
Megatron's global arguments.
"""

import os
import sys
import typing
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import reduce
from typing import Any

from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import arguments as megatron_arguments
from megatron.training import get_args
from megatron.training.argument_utils import ArgumentGroupFactory

# By name: for other scripts, Megatron's own may have been replaced by one that comes here.
from megatron.training.arguments import (
    parse_and_validate_args as megatron_parse_and_validate_args,
)

from megatron_moe_comp.compression.random_stream import TrainingStep
from megatron_moe_comp.options.checks import flag
from megatron_moe_comp.options.codec_options import CodecOptions
from megatron_moe_comp.options.config import CompressionConfig
from megatron_moe_comp.options.lsh_options import LshOptions
from megatron_moe_comp.options.t5_options import T5Options

ArgsProvider = Callable[[ArgumentParser], ArgumentParser]


class _FlagFactory(ArgumentGroupFactory):
    """Megatron's flags-from-dataclass factory, leaving the check of choices to the dataclass."""

    def _extract_type(self, config_type: Any) -> dict[str, Any]:  # noqa: ANN401
        origin, parameters = typing.get_origin(config_type), typing.get_args(config_type)
        if origin is typing.Literal:
            return {"type": str, "metavar": "{" + ",".join(parameters) + "}"}
        if origin is tuple:
            return {"type": str, "nargs": "*", "metavar": "NAME"}
        return super()._extract_type(config_type)


def add_compression_args(parser: ArgumentParser) -> ArgumentParser:
    """Returns `parser` with one flag per CompressionConfig field (an `extra_args_provider`)."""
    bases = (CodecOptions, LshOptions)
    of_bases = [field.name for base in bases for field in fields(base)]
    _FlagFactory(CodecOptions).build_group(parser, title="compressed expert all-to-all: codecs")
    factory = _FlagFactory(CompressionConfig, exclude=of_bases)
    factory.build_group(parser, title="compressed expert all-to-all")
    _FlagFactory(LshOptions).build_group(parser, title="clustering by locality-sensitive hashing")
    return parser


def add_t5_args(parser: ArgumentParser) -> ArgumentParser:
    """Returns `parser` with one flag per T5Options field (an `extra_args_provider`)."""
    _FlagFactory(T5Options).build_group(parser, title="T5 and sequence-to-sequence data")
    return parser


def t5_options_from_args(args: Namespace) -> T5Options:
    """Returns the T5Options that the flags ask for.

    Raises:
        ValueError: an option has an unusable value.
    """
    return T5Options(**{field.name: getattr(args, field.name) for field in fields(T5Options)})


def add_upcycling_args(parser: ArgumentParser) -> ArgumentParser:
    """Returns `parser` with --upcycle-from (an `extra_args_provider`)."""
    group = parser.add_argument_group(title="starting points")
    group.add_argument(
        "--upcycle-from",
        metavar="DIR",
        help="Start from the dense model whose checkpoint is in DIR: each expert is a copy of its "
        "layer's feed-forward, the routers are new. A checkpoint in --load comes first.",
    )
    return parser


def check_upcycling_args(args: Namespace) -> None:
    """Raises ValueError for options that --upcycle-from cannot work with."""
    if args.upcycle_from is None:
        return
    for option, why in (
        ("pretrained_checkpoint", "it is where to start from, too"),
        ("moe_use_upcycling", "it is Megatron's own conversion"),
        ("spec", "what the layers of the dense model are is not known"),
    ):
        if getattr(args, option):
            raise ValueError(
                f"--upcycle-from={args.upcycle_from}: not with {flag(option)}, since "
                f"{why}. Drop one of them."
            )


def compression_config_from_args(args: Namespace) -> CompressionConfig:
    """Returns the CompressionConfig that the flags ask for, checked against the model's options.

    Raises:
        ValueError: an option has an unusable value, or one that compression cannot work with.
    """
    values = {f.name: getattr(args, f.name) for f in fields(CompressionConfig)}
    values["moe_a2a_wires"] = tuple(values["moe_a2a_wires"])
    if values["moe_a2a_seed"] is None:
        values["moe_a2a_seed"] = args.seed
    if values["moe_a2a_ranks_per_node"] is None:
        ranks_per_node = os.environ.get("LOCAL_WORLD_SIZE")
        values["moe_a2a_ranks_per_node"] = int(ranks_per_node) if ranks_per_node else None
    config = CompressionConfig(**values)
    if config.enabled and args.num_experts is None:
        raise ValueError(
            f"--moe-a2a-compress={config.moe_a2a_compress}: there is no expert all-to-all in a "
            "model without experts. Set --num-experts, or use --moe-a2a-compress=none."
        )
    config.check_model(args)
    return config


def plan_base_of_args(args: Namespace) -> CompressionConfig:
    """Returns the options of the flags that go with any method, the method being auto.

    Raises:
        ValueError: see `compression_config_from_args`.
    """
    asked = compression_config_from_args(args)
    kept = ("seed", "wires", "scope", "ranks_per_node", "chunks")
    values = {name: getattr(asked, name) for name in (f"moe_a2a_{suffix}" for suffix in kept)}
    base = CompressionConfig(moe_a2a_compress="auto", moe_a2a_dedup=asked.moe_a2a_dedup, **values)
    base.check_model(args)
    return base


def parse_and_validate_args(
    *extra_args_providers: ArgsProvider, args_defaults: dict[str, Any] | None = None
) -> tuple[Namespace, CompressionConfig]:
    """Parses Megatron's flags and ours, and sets Megatron's global arguments.

    Our checks come before Megatron's: its assertions do not name the remedy.

    Args:
        extra_args_providers: applied to the parser after our own flags.
        args_defaults: values of flags that were not given, as Megatron's function takes them.

    Raises:
        ValueError: see `compression_config_from_args` and `check_upcycling_args`.
    """
    provider = with_our_flags(*extra_args_providers)
    check_unvalidated(megatron_arguments.parse_args(provider))
    args = megatron_parse_and_validate_args(
        extra_args_provider=provider, args_defaults=args_defaults or {}
    )
    return args, compression_config_from_args(args)


def check_unvalidated(args: Namespace) -> None:
    """Raises ValueError for our options that cannot work, before Megatron looks at its own."""
    check_upcycling_args(args)
    compression_config_from_args(args)
    trains = (args.train_iters or args.train_samples) and not args.skip_train
    if trains and args.eval_interval is None and not args.full_validation:
        raise ValueError(
            "--eval-interval: is missing, and Megatron divides by it to know how many samples it "
            "evaluates. Add --eval-interval 1000, and --eval-iters 0 for no evaluation."
        )


def with_our_flags(*extra_args_providers: ArgsProvider) -> ArgsProvider:
    """Returns a provider of our own flags and then those of others."""

    def add_all(parser: ArgumentParser) -> ArgumentParser:
        ours = (add_compression_args, add_upcycling_args)
        return reduce(lambda p, add: add(p), (*ours, *extra_args_providers), parser)

    return add_all


def parse_command(command: Sequence[str]) -> Namespace:
    """Returns what the flags of a command line say, with nothing validated, set or built.

    Args:
        command: of an entry script, Megatron-LM's or ours, which may be torchrun's, with flags.

    Raises:
        ValueError: no entry script is named.
    """
    script = next((i for i, word in enumerate(command) if word.endswith(".py")), None)
    name = None if script is None else os.path.basename(command[script])
    providers = {
        "pretrain_gpt_moe.py": (),
        "finetune_t5_moe.py": (add_t5_args,),
        "pretrain_gpt.py": (),  # Megatron-LM's own
    }
    if name not in providers:
        raise ValueError(
            f"{' '.join(command[:3])}: which script the flags are for is not known. Write one of "
            f"{', '.join(providers)} before them."
        )
    before, sys.argv = sys.argv, list(command[script:])
    try:
        return megatron_arguments.parse_args(with_our_flags(*providers[name]))
    finally:
        sys.argv = before


def current_step() -> TrainingStep:
    """Returns where training is now, as Megatron's globals tell."""
    return TrainingStep(
        iteration=getattr(get_args(), "curr_iteration", 0), num_microbatches=get_num_microbatches()
    )


def finished_iterations() -> int:
    """Returns how many iterations the model has been trained for."""
    args = get_args()
    return max(args.iteration, getattr(args, "curr_iteration", -1) + 1)
