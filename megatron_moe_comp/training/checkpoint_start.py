"""The checkpoint to start from: which it is, and what Megatron's arguments in it say."""

import copy
import io
from argparse import Namespace
from contextlib import redirect_stdout
from typing import Any, NamedTuple

from megatron.training import get_args
from megatron.training.checkpointing import (
    checkpoint_exists,
    get_checkpoint_tracker_filename,
    load_args_from_checkpoint,
    read_metadata,
)

from megatron_moe_comp.options.checks import flag
from megatron_moe_comp.options.t5_options import T5Options

LSH_STATE = "moe_lsh_state"
AUTO_DECISION = "moe_a2a_auto_decision"
NON_STRICT = ("log_unexpected", "log_all", "ignore_all")
"""Values of --dist-ckpt-strictness that ask for what fits."""


class CheckpointToLoad(NamedTuple):
    """Where Megatron will find a checkpoint."""

    option: str
    """The flag that names `directory`."""
    directory: str
    iteration: int
    is_release: bool
    is_strict: bool
    """Whether all of the model must be in the checkpoint, and all of it in the model."""


def checkpoint_to_load() -> CheckpointToLoad | None:
    """Returns the checkpoint that Megatron will load into the model, or None.

    None, too, for what Megatron chooses among on its own: non-persistent checkpoints.
    """
    args = get_args()
    if args.non_persistent_ckpt_type is not None or args.moe_use_upcycling:
        return None
    option, directory = "--load", args.load
    if args.pretrained_checkpoint is not None and not checkpoint_exists(directory):
        option, directory = "--pretrained-checkpoint", args.pretrained_checkpoint
    is_strict = args.dist_ckpt_strictness not in NON_STRICT
    return checkpoint_in(option, directory, args.ckpt_step, is_strict)


def checkpoint_in(
    option: str, directory: str | None, iteration: int | None = None, is_strict: bool = True
) -> CheckpointToLoad | None:
    """Returns the latest checkpoint in a directory, or that of an iteration, or None."""
    latest, is_release = -1, False
    if checkpoint_exists(directory):
        latest, is_release = read_metadata(get_checkpoint_tracker_filename(directory))
    iteration = iteration or latest
    if directory is None or iteration == -1:
        return None
    return CheckpointToLoad(option, directory, iteration, is_release, is_strict)


def lsh_state_of_checkpoint() -> list[dict[str, float]] | None:
    """Returns the clustering's state in the checkpoint that training resumes, or None.

    It travels with the arguments that Megatron saves in every checkpoint, so that stock Megatron
    can load the checkpoint, too.
    """
    if get_args().finetune:
        return None
    return getattr(_args_of_checkpoint("load"), LSH_STATE, None)


def keep_lsh_state(state: list[dict[str, float]]) -> None:
    """Has the next checkpoints hold the clustering's state."""
    setattr(get_args(), LSH_STATE, state)


def auto_decision_of_checkpoint() -> dict[str, Any] | None:
    """Returns what auto chose in the training that is resumed, or None; saved as lsh's state."""
    if get_args().finetune:
        return None
    return getattr(_args_of_checkpoint("load"), AUTO_DECISION, None)


def keep_auto_decision(decision: dict[str, Any]) -> None:
    """Has the next checkpoints hold what auto chose."""
    setattr(get_args(), AUTO_DECISION, decision)


def check_t5_options_of_checkpoint(options: T5Options) -> None:
    """Raises ValueError where a checkpoint to start from is of a T5 that computes otherwise.

    The shapes of its weights do not tell; Megatron takes flags over for its own options alone.
    """
    for start in ("load", "pretrained_checkpoint", "upcycle_from"):
        saved = _args_of_checkpoint(start)
        for name in ("t5_activation", "t5_relative_positions"):
            wanted = getattr(options, name)
            has = getattr(saved, name, wanted)
            if has != wanted:
                raise ValueError(
                    f"{flag(name)}={wanted}: {flag(start)} {getattr(get_args(), start)} was saved "
                    f"with {has}. "
                    + (
                        f"Use {flag(name)}{'' if has is True else f' {has}'}."
                        if has
                        else "Drop it."
                    )
                )


def _args_of_checkpoint(option: str) -> Namespace | None:
    """Returns the arguments in the checkpoint that `option` names, or None."""
    # What this takes over from them goes to a namespace that is dropped, and what Megatron prints
    # about that would mislead.
    with redirect_stdout(io.StringIO()):
        found = load_args_from_checkpoint(copy.copy(get_args()), option)
    return found[1] if isinstance(found, tuple) else None
