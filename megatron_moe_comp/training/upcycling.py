"""Starts a model with experts from a dense checkpoint: each expert is the layer's feed-forward.

Komatsuzaki et al. 2023, Sparse Upcycling. Megatron's --moe-use-upcycling is for GPT with experts in
every layer, and converts in a run of its own.
"""

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import print_rank_0
from megatron.training.models.dist_utils import build_virtual_pipeline_stages
from megatron.training.models.gpt import GPTModelConfig

from megatron_moe_comp.comm.all_to_all import gather_over_ranks
from megatron_moe_comp.training.checkpoint_compare import (
    MAX_LINES,
    CheckpointPaths,
    checkpoint_paths,
    require_fit,
    sharded_states,
)
from megatron_moe_comp.training.checkpoint_start import CheckpointToLoad, checkpoint_in

OPTION = "--upcycle-from"
EXTRA_STATE = "_extra_state"
"""End of the names of Transformer Engine's own state, which is not of the model."""

DENSE = {
    "num_moe_experts": None,
    "moe_layer_freq": 1,
    "expert_model_parallel_size": 1,
    "perform_initialization": False,
    # The weights are divided alike without it, and stock local norms refuse it.
    "sequence_parallel": False,
    "tp_comm_overlap": False,
}
"""What makes a TransformerConfig with experts one of the same model without."""

ROUTER = re.compile(r"\.mlp\.router\.")
SOURCES = (
    (re.compile(r"\.mlp\.experts\.local_experts\.\d+\."), ".mlp."),
    (re.compile(r"\.mlp\.experts\.(linear_fc[12]\.(?:weight|bias))\d+$"), r".mlp.\1"),
    # In front of a dense feed-forward, Transformer Engine has the norm in the linear layer.
    (re.compile(r"\.pre_mlp_layernorm\.(weight|bias)$"), r".mlp.linear_fc1.layer_norm_\1"),
)
"""What the dense model calls the parameters of an MoE layer, by pattern and replacement."""


def use_upcycling(
    model_config: GPTModelConfig, directory: str, find: Callable[[], CheckpointToLoad | None]
) -> None:
    """Has the model that `model_config` builds start from the dense checkpoint in `directory`.

    Args:
        model_config: changed in place: it gets a `pre_wrap_hook`.
        directory: with Megatron's checkpoint of the dense model.
        find: returns the checkpoint that Megatron will load afterwards; if there is one, nothing
            is upcycled.

    Raises:
        ValueError: a model option cannot work with upcycling.
    """
    config = model_config.transformer
    for option, is_wrong, remedy in (
        ("no --num-experts", config.num_moe_experts is None, "Set it, or use --load."),
        (
            "--moe-shared-expert-intermediate-size",
            config.moe_shared_expert_intermediate_size is not None,
            "The dense model has no shared experts to start from. Drop the option.",
        ),
        (
            f"--expert-tensor-parallel-size={config.expert_tensor_parallel_size}",
            config.expert_tensor_parallel_size != config.tensor_model_parallel_size,
            "Each rank copies its part of the feed-forward. Set "
            f"--expert-tensor-parallel-size={config.tensor_model_parallel_size}.",
        ),
        (
            "--init-model-with-meta-device",
            config.init_model_with_meta_device,
            "The copies need memory at once. Drop the option.",
        ),
    ):
        if is_wrong:
            raise ValueError(f"{OPTION}={directory}: cannot work with {option}. {remedy}")
    model_config.pre_wrap_hooks.append(partial(upcycle, model_config, directory, find))


def upcycle(
    model_config: GPTModelConfig,
    directory: str,
    find: Callable[[], CheckpointToLoad | None],
    models: list[MegatronModule],
) -> list[MegatronModule]:
    """Returns `models` with the parameters of the dense checkpoint (a `pre_wrap_hook`).

    Routers keep their random start. See `use_upcycling` for the arguments.

    Raises:
        ValueError: on all ranks, if there is no checkpoint, or it lacks a parameter or has it in
            another shape.
    """
    resumed = find()
    if resumed is not None:
        print_rank_0(f"{OPTION}: skipped, since {resumed.option} {resumed.directory} comes first")
        return models
    checkpoint = checkpoint_in(OPTION, directory)
    paths = CheckpointPaths(None, None)
    if checkpoint is not None:
        paths = checkpoint_paths(checkpoint, expert_parallel=False)
    if not any(paths):
        raise ValueError(
            f"{OPTION}={directory}: there is no checkpoint of --ckpt-format torch_dist or torch. "
            "Name the directory that --save had."
        )
    # Training shall draw the numbers that it draws without a second model.
    with torch.random.fork_rng(devices=[]):
        dense = build_dense(model_config)
    require_fit(checkpoint, paths, dense)
    load_dense(paths, dense)
    wrong = [line for pair in zip(models, dense, strict=True) for line in copy_parameters(*pair)]
    wrong = sorted(set().union(*gather_over_ranks(wrong)))
    if wrong:
        more = [f"and {len(wrong) - MAX_LINES} more"] * (len(wrong) > MAX_LINES)
        raise ValueError(
            "\n    ".join([f"{OPTION}={directory}: not copied:", *wrong[:MAX_LINES], *more])
            + "\nThe experts must be built as the dense model's feed-forward: "
            "--moe-ffn-hidden-size its --ffn-hidden-size, activation and biases alike."
        )
    print_rank_0(f"{OPTION}: experts start as the feed-forwards of {directory}")
    scaled_by = what_scales_experts(model_config.transformer)
    if scaled_by:
        print_rank_0(
            f"WARNING: {OPTION}: at first the model's outputs are not the dense model's, since "
            f"{scaled_by}"
        )
    return models


def build_dense(model_config: GPTModelConfig) -> list[MegatronModule]:
    """Returns this rank's chunks of the model without experts, uninitialised."""
    dense = copy.copy(model_config)
    for name, value in vars(model_config).items():
        if isinstance(value, TransformerConfig):
            changed = copy.copy(value)
            for option, setting in DENSE.items():
                setattr(changed, option, setting)
            setattr(dense, name, changed)
    return build_virtual_pipeline_stages(
        dense.get_builder_cls()(dense).build_model,
        ProcessGroupCollection.use_mpu_process_groups(),
        dense.transformer.virtual_pipeline_model_parallel_size,
    )


def load_dense(paths: CheckpointPaths, models: list[MegatronModule]) -> None:
    """Fills the models from a checkpoint that fits them; a collective for `torch_dist`."""
    keys = ["model"] if len(models) == 1 else [f"model{i}" for i in range(len(models))]
    content: dict[str, Any]
    if paths.sharded:
        states = zip(keys, sharded_states(paths.sharded, models), strict=True)
        wanted = {key: _without_extra_state(state) for key, state in states}
        content = dist_checkpointing.load(wanted, str(paths.sharded))
    else:
        content = torch.load(paths.file_of_rank, map_location="cpu", mmap=True)
    for key, model in zip(keys, models, strict=True):
        if key in content:  # not of a stage without layers
            model.load_state_dict(_without_extra_state(content[key]), strict=False)


def _without_extra_state(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if not name.endswith(EXTRA_STATE)}


@torch.no_grad()
def copy_parameters(model: MegatronModule, dense: MegatronModule) -> list[str]:
    """Copies a dense chunk's parameters into one with experts; returns what could not be copied."""
    sources = dict(dense.named_parameters())
    unused, wrong = set(sources), []
    for name, parameter in model.named_parameters():
        if ROUTER.search(name):
            continue
        source = source_of(name, sources)
        if source is None:
            wrong.append(f"{name} {list(parameter.shape)}: not in the dense model")
            continue
        unused.discard(source)
        if sources[source].shape != parameter.shape:
            shape = list(sources[source].shape)
            wrong.append(f"{name} {list(parameter.shape)}: {source} is {shape}")
            continue
        parameter.copy_(sources[source])
    return wrong + [f"{name} of the dense model: not in the model with experts" for name in unused]


def source_of(name: str, sources: dict[str, torch.nn.Parameter]) -> str | None:
    """Returns the dense model's name of a parameter, or None."""
    names = [name, *(pattern.sub(by, name) for pattern, by in SOURCES)]
    return next((candidate for candidate in names if candidate in sources), None)


def what_scales_experts(config: TransformerConfig) -> str | None:
    """Returns why the weights of a token's experts do not sum to one, or None if they do."""
    all_chosen = config.moe_router_topk == config.num_moe_experts
    if config.moe_router_topk_scaling_factor not in (None, 1.0):
        return "--moe-router-topk-scaling-factor multiplies the experts' outputs"
    if "sinkhorn" in config.moe_router_load_balancing_type:
        return "sinkhorn routing does not normalise the experts' probabilities"
    if config.moe_router_score_function == "softmax":
        if config.moe_router_pre_softmax and not all_chosen:
            return "--moe-router-pre-softmax multiplies the experts' outputs by their probability"
    elif config.moe_router_topk == 1:
        return "an expert's output is multiplied by its score"
    if config.moe_expert_capacity_factor is not None:
        return "--moe-expert-capacity-factor drops tokens"
    return None
