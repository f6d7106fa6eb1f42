"""Runs unmodified Megatron on a machine without CUDA, on CPU and gloo.

    if patches.is_needed():
        message = patches.enable()
        provider = settings.add_settings    # called last in the extra_args_provider
    args = parse_and_validate_args(extra_args_provider=provider)

Nothing happens on import. ``enable`` replaces the names listed in ``CPU_PATCHES`` and
``WHEEL_PATCHES``, each for the reason given there, in this process only; no file of Megatron is
touched. ``repair_wheel`` is the part of it that a CUDA machine without Transformer Engine and Apex
wants too. The Megatron options of such a run are in ``settings``.
"""

import importlib
import importlib.metadata
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_moe_comp.cpu_host import replacements as cpu
from megatron_moe_comp.cpu_host import wheel as wheel
from megatron_moe_comp.cpu_host.settings import SETTINGS

TESTED_MEGATRON = "0.19.2"
RNG_LOGGER = "megatron.core.tensor_parallel.random"

_MARK = "_replaced_by_cpu_host"


@dataclass(frozen=True)
class Patch:
    """One name that is replaced."""

    target: str
    """Dotted path of the name, as its users in Megatron look it up."""
    replace: Callable[[Any], Any]
    """Called once with the original; returns what takes its place."""
    why: str
    """What fails without it."""
    seen_in: str = TESTED_MEGATRON
    """Version of Megatron in which that was seen."""


CPU_PATCHES = (
    Patch(
        "megatron.training.training.initialize_megatron",
        cpu.with_cuda_allowed_missing,
        'AssertionError "Megatron requires CUDA": pretrain() does not forward allow_no_cuda',
    ),
    Patch(
        "torch.cuda.device_count",
        cpu.with_local_world_size,
        "initialize_megatron leaves out the model parallel groups and their seeds: AssertionError "
        "at their first use",
    ),
    Patch("torch.cuda.set_device", cpu.returns(None), "initialize_megatron: RuntimeError"),
    Patch(
        "torch.cuda.current_device",
        cpu.returns(torch.device("cpu")),
        "about 30 places create tensors on it, the first barrier among them: RuntimeError",
    ),
    Patch("torch.tensor", cpu.with_cpu_device, 'pretrain says device="cuda": RuntimeError'),
    Patch("torch.zeros", cpu.with_cpu_device, 'the schedules say device="cuda": RuntimeError'),
    Patch("torch.rand", cpu.with_cpu_device, 'the warm-up says device="cuda": RuntimeError'),
    Patch(
        "torch.ones",
        cpu.with_cpu_device,
        "the causal mask of --no-create-attention-mask-in-dataloader: RuntimeError",
    ),
    Patch(
        "torch.empty",
        cpu.with_cpu_device,
        "--ckpt-fully-parallel-load of what other ranks need (EP with DP): RuntimeError",
    ),
    Patch("torch.empty_like", cpu.with_cpu_device, "--ckpt-fully-parallel-load: RuntimeError"),
    Patch("torch.Tensor.cuda", cpu.with_same_tensor, "the model is moved: RuntimeError"),
    Patch("torch.cuda.synchronize", cpu.returns(None), "the timers: RuntimeError"),
    Patch("torch.cuda.Stream", cpu.with_cpu_stream, "MoE dispatcher, DDP: AcceleratorError"),
    Patch("torch.cuda.current_stream", cpu.returns(cpu.CpuStream()), "DDP: RuntimeError"),
    Patch("torch.cuda.get_rng_state", cpu.with_cpu_generator_state, "RNG tracker: RuntimeError"),
    Patch(
        "torch.cuda.set_rng_state",
        cpu.with_cpu_generator_set,
        "SILENT: queued for a CUDA start that never comes, while get_rng_state answers; Megatron "
        "itself sets the CPU's state beside it",
    ),
    Patch(
        "torch.cuda.manual_seed",
        cpu.with_cpu_seed,
        "SILENT: queued likewise; all streams of the RNG tracker are one, so expert parallel ranks "
        "start from the same weights",
    ),
    Patch(
        "megatron.core.tensor_parallel.random._get_cuda_rng_state",
        cpu.with_cpu_generator_state,
        "the first fork of the RNG tracker: RuntimeError",
    ),
    Patch(
        "megatron.core.tensor_parallel.random._set_cuda_rng_state",
        cpu.with_cpu_generator_set,
        "SILENT: queued likewise; the RNG tracker stays in its last stream, so the copies of dense "
        "weights on expert parallel ranks start out different",
    ),
    Patch(
        "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",
        cpu.with_splits_as_numpy,
        "the stock all-to-all dispatcher passes tensors as splits to all_to_all_single: TypeError",
    ),
    Patch(
        "torch.Tensor.type",
        cpu.with_cuda_type_names,
        "the optimizers look for 'torch.cuda.FloatTensor': AssertionError when clipping gradients",
    ),
    Patch(
        "megatron.training.arguments.get_device_arch_version",
        cpu.returns(cpu.REPORTED_ARCH_VERSION),
        "with tensor parallelism: RuntimeError",
    ),
    Patch(
        "torch.cuda.memory_stats",
        cpu.with_zero_statistics,
        "--log-memory-to-tensorboard: KeyError 'reserved_bytes.all.current'",
    ),
    Patch(
        "megatron.core.tensor_parallel.mappings._gather_along_first_dim",
        cpu.with_equal_gather_parts,
        "expert tensor parallelism: gloo's allgather refuses parts of unequal size: RuntimeError",
    ),
    Patch(
        "megatron.training.training.build_pretraining_data_loader",
        cpu.with_own_generator,
        "SILENT: starting a DataLoader draws from the generator that dropout uses; the losses of "
        "a resumed run differ",
    ),
)
"""What the absence of CUDA asks for."""

_DISTRIBUTED_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"

WHEEL_PATCHES = (
    Patch(
        "megatron.core.datasets.utils.compile_helpers",
        wheel.without_makefile,
        "rank 0 exits: make finds no Makefile; the wheel ships the helpers compiled",
    ),
    Patch(
        f"{_DISTRIBUTED_OPTIMIZER}.sharded_state_dict",
        wheel.with_state_before_loading,
        "loading torch_dist: AssertionError (len(steps) == 1) before the optimizer's first step",
    ),
    Patch(
        f"{_DISTRIBUTED_OPTIMIZER}.load_state_dict",
        wheel.with_one_step_tensor_each,
        "SILENT: after loading all parameters share one step tensor, which each of them advances",
    ),
    Patch(
        f"{_DISTRIBUTED_OPTIMIZER}._set_main_param_and_optimizer_states",
        wheel.with_step_left_alone,
        "loading: RuntimeError, in-place on a leaf; behind it KeyError 'step', and for torch_dist "
        "a step of 0 put back in silence",
    ),
)
"""What the wheel lacks without Transformer Engine and Apex, with or without CUDA."""


def is_needed() -> bool:
    """Returns True where no CUDA device is visible, for whatever reason."""
    return not torch.cuda.is_available()


def enable() -> str:
    """Replaces what ``CPU_PATCHES`` and ``WHEEL_PATCHES`` name; returns a line that says so.

    A second call changes nothing.

    Raises:
        RuntimeError: where CUDA is available, or a name is missing from the installed Megatron.
    """
    if not is_needed():
        raise RuntimeError(
            "CPU host mode would redirect torch.cuda to the CPU, but a CUDA device is available; "
            "start without it, or hide the devices with CUDA_VISIBLE_DEVICES=''"
        )
    patches = CPU_PATCHES + WHEEL_PATCHES
    _apply(patches)
    logging.getLogger(RNG_LOGGER).addFilter(cpu.is_not_rng_warning)
    # On CPU torch.compile needs a C++ compiler, which a bare machine lacks, and 10 s to start.
    torch._dynamo.config.disable = True
    flags = " ".join(setting.flag for setting in SETTINGS)
    return (
        f"CPU host mode: no CUDA device visible; gloo, {len(patches)} Megatron and torch names "
        f"replaced ({__name__}); set: {flags}"
    )


def repair_wheel() -> None:
    """Replaces what ``WHEEL_PATCHES`` name; harmless with Transformer Engine or Apex.

    Raises:
        RuntimeError: where a name is missing from the installed Megatron.
    """
    _apply(WHEEL_PATCHES)


def _apply(patches: tuple[Patch, ...]) -> None:
    """Replaces each target that is not replaced yet, or none if one is missing."""
    version = importlib.metadata.version("megatron-core")
    if version != TESTED_MEGATRON:
        warnings.warn(
            f"tested with megatron-core {TESTED_MEGATRON}, but {version} is installed",
            stacklevel=3,
        )
    owners = {patch.target: find_owner(patch.target) for patch in patches}
    missing = [target for target, owner in owners.items() if owner is None]
    if missing:
        raise RuntimeError(
            f"megatron-core {version} with torch {torch.__version__} has no {', '.join(missing)}, "
            f"which is to be replaced; install megatron-core=={TESTED_MEGATRON}"
        )
    for patch in patches:
        owner, name = owners[patch.target], patch.target.rpartition(".")[2]
        original = getattr(owner, name)
        if not getattr(original, _MARK, False):
            replacement = patch.replace(original)
            setattr(replacement, _MARK, True)
            setattr(owner, name, replacement)


def find_owner(target: str) -> object | None:
    """Returns the module or class that holds ``target``, or None where it does not exist."""
    path = target.split(".")
    for depth in range(len(path) - 1, 0, -1):
        try:
            owner: object = importlib.import_module(".".join(path[:depth]))
        except ModuleNotFoundError as error:
            if not target.startswith(error.name or "?"):
                raise  # something that Megatron itself imports is not installed
            continue
        for name in path[depth:-1]:
            owner = getattr(owner, name, None)
        return owner if hasattr(owner, path[-1]) else None
    return None
