"""Compressed all-to-alls for an entry script in the shape of Megatron-LM's pretrain_gpt.py.

    parse_and_validate_args, pretrain = compressed(pretrain)

is all that such a script adds, before it calls the two.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import wraps
from typing import Any

from megatron import training
from megatron.core.enums import ModelType
from megatron.training import arguments
from megatron.training.config.container import PretrainConfigContainer
from megatron.training.models.gpt import GPTModelConfig

from megatron_moe_comp.options.config import CompressionConfig
from megatron_moe_comp.training.run import compressed_training, parse_args

Parse = Callable[..., Namespace]
Pretrain = Callable[..., Any]


def compressed(pretrain: Pretrain) -> tuple[Parse, Pretrain]:
    """Returns Megatron's parse_and_validate_args with our flags, and `pretrain` obeying them.

    Args:
        pretrain: Megatron's function, or one with its arguments.
    """
    parsed: list[tuple[Namespace, CompressionConfig]] = []

    def parse_and_validate_args(
        extra_args_provider: Callable[[ArgumentParser], ArgumentParser] | None = None,
        ignore_unknown_args: bool = False,
        args_defaults: dict[str, Any] | None = None,
    ) -> Namespace:
        if ignore_unknown_args:
            raise ValueError("ignore_unknown_args: a mistyped flag would go unnoticed. Drop it.")
        providers = () if extra_args_provider is None else (extra_args_provider,)
        parsed.append(parse_args(*providers, args_defaults=args_defaults))
        args = parsed[-1][0]
        if args.inprocess_restart:
            raise ValueError(
                "--inprocess-restart: what compression keeps for a run is not built anew by it. "
                "Drop the option; restart the processes instead."
            )
        return args

    @wraps(pretrain)
    def train(
        cfg_container: PretrainConfigContainer,
        train_valid_test_dataset_provider: Callable[..., Any],
        model_type: ModelType,
        forward_step_func: Callable[..., Any],
        *rest: Any,  # noqa: ANN401
        **keywords: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        model = getattr(cfg_container, "model", None)
        if not parsed:
            raise ValueError(
                "pretrain(): comes after parse_and_validate_args(), which knows the flags. Call "
                "that first, as Megatron-LM's pretrain_gpt.py does."
            )
        if not isinstance(model, GPTModelConfig):
            raise ValueError(
                f"pretrain() was given {type(model).__name__} as configuration of the model: the "
                "MoE layers are replaced in a GPTModelConfig. Use gpt_config_from_args(args)."
            )
        names = [f"layer {number + 1}" for number in range(model.transformer.num_layers)]
        with compressed_training(*parsed[-1], model, names) as watched:
            return pretrain(
                cfg_container,
                train_valid_test_dataset_provider,
                model_type,
                watched(forward_step_func),
                *rest,
                **keywords,
            )

    return parse_and_validate_args, train


def replace_names() -> None:
    """Has scripts that are imported from now on find our two functions in Megatron's places."""
    arguments.parse_and_validate_args, training.pretrain = compressed(training.pretrain)
