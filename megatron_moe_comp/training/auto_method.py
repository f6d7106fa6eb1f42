"""What --moe-a2a-compress=auto stands for: decided at the start, from a short measurement."""

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.training.initialize import _initialize_distributed

from megatron_moe_comp.comm.all_to_all import gather_over_ranks
from megatron_moe_comp.options.config import CompressionConfig
from megatron_moe_comp.plan.cost_model import Machine
from megatron_moe_comp.plan.measure import measure_machine
from megatron_moe_comp.plan.methods import (
    choose,
    method_of,
    predict_all,
    safe_configs,
    stock_method,
)
from megatron_moe_comp.plan.shape import Layout, Model, layout_of_args, model_of_args
from megatron_moe_comp.training import checkpoint_start


@dataclass(frozen=True)
class _Decision:
    config: CompressionConfig
    reason: str
    measured: dict[str, float] | None

    def as_dict(self) -> dict[str, Any]:
        """Returns what is saved in checkpoints and reported."""
        return {
            "method": self.config.moe_a2a_compress,
            "bits": self.config.moe_a2a_bits if self.config.enabled else None,
            "bit_policy": self.config.moe_a2a_bit_policy if self.config.enabled else None,
            "reason": self.reason,
            "measured": self.measured,
        }


def resolve_auto(
    args: Namespace, config: CompressionConfig
) -> tuple[CompressionConfig, dict[str, Any] | None]:
    """Returns the configuration with auto replaced by its choice, and that choice with its reason.

    All ranks get the same. The choice is saved with Megatron's arguments in every checkpoint, and a
    run that resumes one does not measure again. With another method nothing happens.

    Args:
        args: Megatron's, validated.
        config: the options in use.
    """
    if config.moe_a2a_compress != "auto":
        return config, None
    # As Megatron's own call, which finds everything in place and goes on.
    _initialize_distributed(None, None, None)
    saved = checkpoint_start.auto_decision_of_checkpoint()
    decision = _measured_decision(args, config) if saved is None else _resumed(saved, config)
    # Ranks on unequal hosts may round differently, or see different files.
    method, chosen = gather_over_ranks((decision.config, decision.as_dict()))[0]
    checkpoint_start.keep_auto_decision(chosen)
    return method, chosen


def _resumed(saved: dict[str, Any], config: CompressionConfig) -> _Decision:
    """Returns the decision of the run that is resumed; bits that are given now come first."""
    bits = None if saved["method"] == "none" else config.moe_a2a_bits or saved["bits"]
    return _Decision(config.resolved(bits), "as in the checkpoint", saved["measured"])


def _measured_decision(args: Namespace, config: CompressionConfig) -> _Decision:
    per_node = config.moe_a2a_ranks_per_node or args.world_size
    layout = layout_of_args(args, args.world_size, per_node, load=1.0)
    model = model_of_args(args, layout)
    if layout.expert_parallel == 1:
        return _Decision(config.resolved(None), "since no rank sends rows to another", None)
    device = torch.device("cpu")
    if "nccl" in args.distributed_backend:
        device = torch.device("cuda", args.local_rank)
    group = parallel_state.get_expert_model_parallel_group()
    codings = [c for found in safe_configs(config, layout) for c in (found.forward, found.backward)]
    codecs = dict.fromkeys([*(coding.codec for coding in codings), "identity"])
    machine = measure_machine(model, layout, group, device, codecs)
    return decide(config, model, layout, machine)


def decide(config: CompressionConfig, model: Model, layout: Layout, machine: Machine) -> _Decision:
    """Returns the decision that follows from a measurement, of which no further rank is asked."""
    candidates = safe_configs(config, layout)
    methods = [method_of(str(c.moe_a2a_bits), c, model, layout) for c in candidates]
    stock, *predictions = predict_all(
        model, layout, machine, [stock_method(model, layout), *methods]
    )
    choice = choose(stock, predictions)
    link = machine.far if layout.far_peers else machine.near
    speed = machine.codecs[candidates[0].forward.codec]
    measured = {
        "link_gbs": link.bandwidth / 1e9,
        "link_latency_us": link.latency * 1e6,
        "encode_gbs": speed.encode * model.value_bytes / 1e9,
        "decode_gbs": speed.decode * model.value_bytes / 1e9,
        "gemm_tflops": machine.flops / 1e12,
        "predicted_speedup": choice.speedup,
    }
    reason = (
        f"predicted to train at {choice.speedup:.2f}x the speed of none; measured: link "
        f"{measured['link_gbs']:.3g} GB/s and {measured['link_latency_us']:.3g} us per message, "
        f"encoding {measured['encode_gbs']:.3g} and decoding {measured['decode_gbs']:.3g} GB/s of "
        f"rows, {measured['gemm_tflops']:.3g} TFLOPS"
    )
    if choice.index is None:
        return _Decision(config.resolved(None), f"birdmoe is {reason}", measured)
    return _Decision(candidates[choice.index], reason, measured)
