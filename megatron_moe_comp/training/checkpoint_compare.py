"""Compares the checkpoint that training starts from with the model, before Megatron loads it.

Megatron ends with a stack trace at the first tensor that does not fit, and in some cases it does
not end at all: it loads the tensors that fit, or stops with exit code 0. Here the whole difference
is one error, on all ranks.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import mpu
from megatron.core.dist_checkpointing import (
    ShardedTensor,
    check_is_distributed_checkpoint,
    load_content_metadata,
    load_tensors_metadata,
)
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model
from megatron.training import print_rank_0
from megatron.training.checkpointing import get_checkpoint_name

from megatron_moe_comp.comm.all_to_all import gather_over_ranks, sum_over_ranks
from megatron_moe_comp.training.checkpoint_start import CheckpointToLoad

MAX_LINES = 10
OF_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")
OF_EXPERTS = re.compile(r"\.(experts|router)\.")

Shapes = dict[str, tuple[int, ...]]


@dataclass
class Differences:
    """What keeps a checkpoint from fitting a model. Name -> shape, or its two shapes."""

    missing: Shapes = field(default_factory=dict)
    """The model's that the checkpoint lacks."""
    unexpected: Shapes = field(default_factory=dict)
    """The checkpoint's that the model lacks."""
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    """Those with another shape in the checkpoint than in the model, in this order."""
    missing_files: dict[str, tuple[()]] = field(default_factory=dict)
    """Files that ranks would read."""

    def union(self, others: Iterable["Differences"]) -> "Differences":
        """Returns what is in any of them."""
        united = Differences()
        for one in (self, *others):
            for of in fields(Differences):
                getattr(united, of.name).update(getattr(one, of.name))
        return united

    def __bool__(self) -> bool:
        return any(getattr(self, of.name) for of in fields(Differences))


def check_checkpoint(
    find: Callable[[], CheckpointToLoad | None], models: list[MegatronModule]
) -> list[MegatronModule]:
    """Returns `models`; raises where the checkpoint to load does not fit (a `post_wrap_hook`).

    Names and shapes are compared, those of the whole model with those of the whole checkpoint
    for `torch_dist`, which any parallel layout can load, and those of each rank for `torch`. Other
    formats are left to Megatron, as is a checkpoint that does not exist.

    Args:
        find: returns the checkpoint, or None where nothing will be loaded.
        models: this rank's chunks of the model.

    Raises:
        ValueError: on all ranks, if the checkpoint does not fit on any.
    """
    checkpoint = find()
    if checkpoint is not None and any(paths := checkpoint_paths(checkpoint)):
        require_fit(checkpoint, paths, unwrap_model(models))
    return models


class CheckpointPaths(NamedTuple):
    """Where a checkpoint is: one of the two, or neither where it is missing or of other format."""

    sharded: Path | None
    """Directory of a `torch_dist` checkpoint."""
    file_of_rank: Path | None
    """File of this rank in a `torch` checkpoint, there or not."""


def checkpoint_paths(
    checkpoint: CheckpointToLoad, expert_parallel: bool | None = None
) -> CheckpointPaths:
    """Returns where the checkpoint is.

    Args:
        checkpoint: as it was found.
        expert_parallel: whether it has files per expert parallel rank; by default, as training.
    """
    where = checkpoint.directory, checkpoint.iteration, checkpoint.is_release
    directory = Path(get_checkpoint_name(*where, return_base_dir=True))
    if directory.is_dir() and check_is_distributed_checkpoint(str(directory)):
        return CheckpointPaths(directory, None)
    if any(directory.glob("mp_rank_*")):
        path = get_checkpoint_name(*where, expert_parallel=expert_parallel)
        return CheckpointPaths(None, Path(path))
    return CheckpointPaths(None, None)


def require_fit(
    checkpoint: CheckpointToLoad, paths: CheckpointPaths, chunks: list[MegatronModule]
) -> None:
    """Raises ValueError on all ranks if the checkpoint does not fit on any; a collective."""
    if paths.sharded:
        mine = compare_sharded(paths.sharded, chunks)
    else:
        mine = compare_file_of_rank(paths.file_of_rank, chunks)
    found = Differences().union(gather_over_ranks(mine))
    if not found:
        return
    which = "release" if checkpoint.is_release else f"of iteration {checkpoint.iteration}"
    text = (
        f"{checkpoint.option}={checkpoint.directory}: the checkpoint {which} does not fit the "
        f"model.\n{describe(found)}"
    )
    if checkpoint.is_strict or found.reshaped or found.missing_files:
        raise ValueError(text)
    print_rank_0(f"WARNING: {text}")


def compare_sharded(directory: Path, models: list[MegatronModule]) -> Differences:
    """Returns how a `torch_dist` checkpoint differs from the model; a collective.

    What is missing or reshaped is this rank's, what is unexpected the whole model's.
    """
    saved: Shapes = {
        name: tuple(tensor.global_shape)
        for name, tensor in sorted(load_tensors_metadata(str(directory)).items())
        if not OF_OPTIMIZER.match(name)
    }
    wanted: dict[str, ShardedTensor] = {}
    for state in sharded_states(directory, models):
        apply_factories(state)
        wanted |= {t.key: t for t in nested_values(state) if isinstance(t, ShardedTensor)}
    found = Differences()
    for name, tensor in wanted.items():
        shape = tuple(tensor.global_shape)
        if name not in saved:
            found.missing[name] = shape
        elif saved[name] != shape and not tensor.allow_shape_mismatch:
            found.reshaped[name] = saved[name], shape
    used = torch.tensor([name in wanted for name in saved], dtype=torch.float64)
    counts = sum_over_ranks(used).tolist()
    found.unexpected = {
        name: shape for (name, shape), n in zip(saved.items(), counts, strict=True) if not n
    }
    return found


def sharded_states(directory: Path, models: list[MegatronModule]) -> list[dict[str, Any]]:
    """Returns the models' tensors under the names by which a `torch_dist` checkpoint has them."""
    # It depends on the checkpoint's metadata by which names and in which shapes.
    metadata = load_content_metadata(str(directory)) or {}
    metadata["dp_cp_group"] = mpu.get_data_parallel_group(with_context_parallel=True)
    return [model.sharded_state_dict(metadata=metadata) for model in models]


def compare_file_of_rank(path: Path, models: list[MegatronModule]) -> Differences:
    """Returns how this rank's file of a `torch` checkpoint differs from its part of the model."""
    found = Differences()
    if not path.exists():
        found.missing_files[f"{path.parent.name}/{path.name}"] = ()
        return found
    content = torch.load(path, map_location="cpu", mmap=True)
    for i, model in enumerate(models):
        state = content.get("model" if len(models) == 1 else f"model{i}")
        if state is None:  # Megatron takes it for an empty stage
            continue
        saved, wanted = _shapes(state), _shapes(model.state_dict())
        found.missing |= {name: wanted[name] for name in wanted.keys() - saved}
        found.unexpected |= {name: saved[name] for name in saved.keys() - wanted}
        found.reshaped |= {
            name: (saved[name], wanted[name])
            for name in saved.keys() & wanted
            if saved[name] != wanted[name]
        }
    return found


def _shapes(state: dict[str, object]) -> Shapes:
    """Returns the shapes of a state dict's tensors but for Transformer Engine's own."""
    return {
        name: tuple(value.shape)
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and not name.endswith("_extra_state")
    }


def describe(found: Differences) -> str:
    """Returns the differences as text, with a remedy."""
    parts = []
    for title, lines in (
        (
            "missing in the checkpoint",
            [f"{name} {list(shape)}" for name, shape in found.missing.items()],
        ),
        (
            "not in the model",
            [f"{name} {list(shape)}" for name, shape in found.unexpected.items()],
        ),
        (
            "of another shape",
            [
                f"{name}: {list(saved)} in the checkpoint, {list(wanted)} in the model"
                for name, (saved, wanted) in found.reshaped.items()
            ],
        ),
        ("missing files of ranks", list(found.missing_files)),
    ):
        if lines:
            shown = [f"    {line}" for line in sorted(lines)[:MAX_LINES]]
            shown += [f"    and {len(lines) - MAX_LINES} more"] * (len(lines) > MAX_LINES)
            parts.append("\n".join([f"  {title}, {len(lines)}:", *shown]))
    return "\n".join([*parts, remedy(found)])


def remedy(found: Differences) -> str:
    """Returns what the user can do about the differences."""
    if found.missing_files:
        return (
            "A checkpoint of --ckpt-format torch needs the tensor, pipeline and expert parallel "
            "sizes that it was saved with; torch_dist fits any."
        )
    lacks_experts = any(map(OF_EXPERTS.search, found.missing))
    has_experts = any(map(OF_EXPERTS.search, found.unexpected))
    if lacks_experts and not has_experts:
        return (
            "The checkpoint is of a model without experts in these layers: start from it with "
            "--upcycle-from in the place of --load."
        )
    if has_experts and not lacks_experts:
        return (
            "The checkpoint is of a model with experts: give it to --load, with its --num-experts "
            "and --moe-layer-freq, or with --use-checkpoint-args, which takes them from it."
        )
    text = (
        "Repeat the model options that the checkpoint was saved with, or take them from it with "
        "--use-checkpoint-args."
    )
    if found.reshaped:
        return text
    return text + " To load what fits nevertheless: --dist-ckpt-strictness log_all."
