"""What the entry scripts share: the host mode, our additions to a training run, and the loss."""

import multiprocessing
import os
import signal
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.models.gpt import GPTModelConfig
from megatron.training.utils import is_rank0

from megatron_moe_comp.cpu_host import patches, settings
from megatron_moe_comp.mcore.layer_specs import (
    use_compressed_moe,
    use_sequence_parallel_norms,
)
from megatron_moe_comp.options.config import CompressionConfig
from megatron_moe_comp.training import arguments, checkpoint_start, dry_run
from megatron_moe_comp.training.auto_method import resolve_auto
from megatron_moe_comp.training.checkpoint_compare import check_checkpoint
from megatron_moe_comp.training.clustering_adaptation import LshAdaptation
from megatron_moe_comp.training.stats_logger import StatsLogger
from megatron_moe_comp.training.upcycling import use_upcycling

SPIKY_LOSS_FACTOR = 10

Loss = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
ForwardStep = Callable[..., Any]
ArgsProvider = Callable[[ArgumentParser], ArgumentParser]


def parse_args(
    *extra_args_providers: ArgsProvider, args_defaults: dict[str, Any] | None = None
) -> tuple[Namespace, CompressionConfig]:
    """Returns Megatron's arguments and the compression's, on this machine with or without CUDA.

    With --dry-run, prints what the run would need and ends the process.

    Args:
        extra_args_providers: of the script's own flags.
        args_defaults: values of Megatron's flags that were not given, as Megatron's parser takes
            them.

    Raises:
        ValueError: options that do not go together, or not with this machine.
    """
    if dry_run.is_requested():
        patches.repair_wheel()
        dry_run.main(*extra_args_providers)
        sys.exit()
    providers = [dry_run.add_dry_run_args, *extra_args_providers]
    if patches.is_needed():
        message = patches.enable()
        providers.append(settings.add_settings)
        if is_rank0():
            print(message, flush=True)
    else:
        patches.repair_wheel()
    return arguments.parse_and_validate_args(*providers, args_defaults=args_defaults)


def train(
    args: Namespace,
    compression: CompressionConfig,
    model_config: GPTModelConfig,
    layer_names: list[str],
    datasets_provider: Callable[..., Any],
    forward_step: ForwardStep,
    **pretrain_kwargs: Any,  # noqa: ANN401
) -> None:
    """Trains with compressed MoE layers and reports what they sent.

    Args:
        args: Megatron's arguments.
        compression: options of the all-to-alls.
        model_config: of the model; its MoE layers are replaced.
        layer_names: of its layers, in the order of the MoE layers' numbers.
        datasets_provider: as Megatron's `pretrain` takes it; every rank calls it.
        forward_step: as Megatron's `pretrain` takes it.
        pretrain_kwargs: further arguments of `pretrain`.
    """
    # Every rank calls it: the datasets know which ranks read.
    datasets_provider.is_distributed = True
    with compressed_training(args, compression, model_config, layer_names) as watched:
        pretrain(
            pretrain_cfg_container_from_args(args, model_config),
            datasets_provider,
            ModelType.encoder_or_decoder,
            watched(forward_step),
            **pretrain_kwargs,
        )
    torch.distributed.destroy_process_group()


@contextmanager
def compressed_training(
    args: Namespace,
    compression: CompressionConfig,
    model_config: GPTModelConfig,
    layer_names: list[str],
) -> Iterator[Callable[[ForwardStep], ForwardStep]]:
    """Has the model that is built and trained inside compress its all-to-alls; reports at the end.

    Yields a decorator: it wraps `forward_step` so that the statistics see its losses. An exception
    inside ends the process at once.

    Args:
        args: Megatron's arguments.
        compression: options of the all-to-alls.
        model_config: of the model; its MoE layers are replaced.
        layer_names: of its layers, in the order of the MoE layers' numbers.
    """
    compression, decision = resolve_auto(args, compression)
    use_compressed_moe(model_config, compression, arguments.current_step)
    use_sequence_parallel_norms(model_config)
    stats = StatsLogger(compression, arguments.current_step, args, decision)
    stats.attach(model_config, layer_names)
    LshAdaptation(
        compression,
        arguments.current_step,
        checkpoint_start.lsh_state_of_checkpoint,
        checkpoint_start.keep_lsh_state,
    ).attach(model_config, len(layer_names))
    if args.upcycle_from is not None:
        use_upcycling(model_config, args.upcycle_from, checkpoint_start.checkpoint_to_load)
    model_config.post_wrap_hooks.append(
        partial(check_checkpoint, checkpoint_start.checkpoint_to_load)
    )
    try:
        yield stats.watched
    except SystemExit as stop:
        # Megatron's orderly stops (a signal, a time or iteration limit) end in sys.exit(0).
        if stop.code in (None, 0):
            stats.finish()
        raise
    except Exception:
        _end_process()
    stats.finish()


def _end_process() -> NoReturn:
    """Prints the exception and ends this process and its own at once.

    Raised, it would have the process wait for its data workers, and with --exit-signal-handler
    those do not heed the signal that is to end them.
    """
    traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the data loader's would raise in here
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(1)


def loss_function(args: Namespace, loss_mask: torch.Tensor, output: torch.Tensor) -> Loss:
    """Returns the summed loss, its number of tokens, and both for the log.

    Args:
        args: Megatron's arguments.
        loss_mask: [B, S], 1 where a token counts.
        output: [B, S], loss per token.
    """
    loss_mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * loss_mask)
    num_tokens = loss_mask.sum().clone().detach().to(torch.int)

    check = partial(get_rerun_state_machine().validate_result, result=loss, tolerance=0.0)
    if args.check_for_nan_in_loss_and_grad:
        check(rejection_func=torch.isnan, message="found NaN in the loss of a rank", fatal=True)
        check(rejection_func=torch.isinf, message="found Inf in the loss of a rank", fatal=True)
    if args.check_for_spiky_loss:
        is_spiky = partial(
            get_rerun_state_machine().is_unexpectedly_large,
            threshold=SPIKY_LOSS_FACTOR,
            context="loss",
        )
        check(rejection_func=is_spiky, message="spiky loss", fatal=False)
    report = torch.cat([loss.clone().detach().view(1), num_tokens.view(1)])
    return loss, num_tokens, {"lm loss": report}
