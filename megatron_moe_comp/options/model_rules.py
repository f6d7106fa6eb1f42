"""Which options of Megatron compression cannot work with, and what to do instead."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelRule:
    """One Megatron option that must have one of the allowed values for compression to work."""

    option: str
    allowed: tuple[Any, ...]
    why: str
    remedy: str


MODEL_RULES = (
    ModelRule(
        "moe_token_dispatcher_type",
        ("alltoall",),
        "compresses the alltoall dispatcher's messages and no other's",
        "Use --moe-token-dispatcher-type=alltoall",
    ),
    ModelRule(
        "moe_shared_expert_overlap",
        (False,),
        "replaces the communicating steps that shared experts would be interleaved with",
        "Drop the option; shared experts then run beside the routed ones",
    ),
    ModelRule(
        "cuda_graph_impl",
        ("none",),
        "sizes its messages on the host in every step, which a CUDA graph cannot capture",
        "Use --cuda-graph-impl=none",
    ),
    ModelRule(
        "overlap_moe_expert_parallel_comm",
        (False,),
        "does not take part in the 1F1B schedule that splits a layer at its all-to-alls",
        "Drop the option",
    ),
    ModelRule(
        "overlap_dispatch_backward_with_experts_wgrad",
        (False,),
        "runs the backward dispatch itself and cannot be overlapped by Megatron's schedule",
        "Drop the option",
    ),
    ModelRule(
        "transformer_impl",
        ("transformer_engine", "local"),
        "compresses training's dispatcher, which the inference stack replaces",
        "Use --transformer-impl=transformer_engine or local",
    ),
    ModelRule(
        "mtp_num_layers",
        (None,),
        "does not reach the layers of multi-token prediction, whose spec Megatron makes itself",
        "Drop the option",
    ),
    ModelRule(
        "moe_expert_rank_capacity_factor",
        (None,),
        "needs the row counts that a rank capacity of the fused dispatchers hides",
        "Drop the option, or bound the load with --moe-expert-capacity-factor",
    ),
)
"""What every method requires."""

DEDUP_RULES = (
    ModelRule(
        "moe_pad_expert_input_to_capacity",
        (False,),
        "with --moe-a2a-dedup sends each token once, which padding every expert's rows contradicts",
        "Drop the option, or --moe-a2a-dedup",
    ),
    ModelRule(
        "moe_router_padding_for_quantization",
        (False, None),
        "with --moe-a2a-dedup sends the rows that were routed and none beside them",
        "Drop the option, and --moe-router-padding-for-fp8: Transformer Engine's experts then pad "
        "their rows",
    ),
)
"""What --moe-a2a-dedup requires besides."""

LSH_RULES = (
    ModelRule(
        "moe_pad_expert_input_to_capacity",
        (False,),
        "sends as many rows to an expert as there are clusters, which padding contradicts",
        "Drop the option; --moe-expert-capacity-factor alone works",
    ),
    ModelRule(
        "moe_router_padding_for_quantization",
        (False, None),
        "sends as many rows to an expert as there are clusters, which padding contradicts",
        "Drop the option, and --moe-router-padding-for-fp8: Transformer Engine's experts then pad "
        "their rows",
    ),
    ModelRule(
        "moe_apply_probs_on_input",
        (False,),
        "applies probabilities to the restored outputs, since a centroid has many",
        "Drop the option",
    ),
)
"""What --moe-a2a-compress=lsh requires besides."""
