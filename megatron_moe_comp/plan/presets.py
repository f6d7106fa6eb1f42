"""Published models, networks and an accelerator to plan for where none is at hand."""

from megatron_moe_comp.plan.cost_model import CodecSpeed, Link, Machine
from megatron_moe_comp.plan.shape import Layout, Model, Stack

CODEC_SHARE = 0.4
"""Assumed: bytes of rows that rq's kernels encode or decode, over the memory bandwidth. On a CPU
encoding reaches 0.38 and decoding 0.87 (benchmarks/results/2026-11-22-codecs.md, where memcpy is
half of the bandwidth); no GPU has been measured."""
PYTORCH_CODEC_SHARE = 0.05
"""Likewise, of codecs without CUDA kernels of their own: several passes of PyTorch."""
MESSAGE_S = 20e-6
"""Assumed: a few kernel launches, to encode or to decode a message."""

MODELS: dict[str, Model] = {
    # Table 1 of DeepSpeed-MoE (Rajbhandari et al., 2022): every other layer has experts.
    "GPT-MoE 52B (1.3B+MoE-128)": Model(
        stacks=(Stack(24, 12, 2048),),
        hidden_size=2048,
        ffn_hidden_size=8192,
        moe_ffn_hidden_size=8192,
        num_experts=128,
        topk=1,
        micro_batch_size=4,
        num_microbatches=16,
        vocab_size=50304,
    ),
    # T5 with experts in every other layer: Switch-Large (Fedus et al., 2022), as
    # huggingface.co/google/switch-large-128.
    "T5-MoE 26B (Switch-Large-128)": Model(
        stacks=(Stack(24, 12, 512), Stack(24, 12, 128, attentions=2)),
        hidden_size=1024,
        ffn_hidden_size=4096,
        moe_ffn_hidden_size=4096,
        num_experts=128,
        topk=1,
        micro_batch_size=16,
        num_microbatches=16,
        vocab_size=32128,
    ),
    # huggingface.co/Qwen/Qwen3-30B-A3B
    "Qwen3-30B-A3B": Model(
        stacks=(Stack(48, 48, 4096),),
        hidden_size=2048,
        ffn_hidden_size=6144,
        moe_ffn_hidden_size=768,
        num_experts=128,
        topk=8,
        micro_batch_size=2,
        num_microbatches=4,
        vocab_size=151936,
        gated=True,
        attention_size=4096,
        kv_size=512,
    ),
}

GBIT = 1e9 / 8
NVLINK = Link(400e9, 3e-6)
NETWORKS: dict[str, tuple[int, Link, Link]] = {
    "100 Gbit/s Ethernet per node of 8": (8, NVLINK, Link(100 * GBIT / 8, 20e-6)),
    "200 Gbit/s Slingshot per rank": (4, NVLINK, Link(200 * GBIT, 5e-6)),
    "400 Gbit/s InfiniBand per rank": (8, NVLINK, Link(400 * GBIT, 3e-6)),
    "NVLink within nodes of 72": (72, NVLINK, Link(400 * GBIT, 3e-6)),
}
"""Ranks per node and a rank's links within and between nodes: nominal bandwidths."""

DEFAULT_NETWORK = "400 Gbit/s InfiniBand per rank"

TABLE_RANKS = (8, 64, 512, 4096)
FLOPS, MEMORY_BANDWIDTH = 400e12, 3.35e12
"""Of an H100 SXM: 40% of its dense bfloat16 peak, and its nominal memory bandwidth."""

ASSUMPTIONS = (
    f"Assumed, not measured: GPUs that achieve {FLOPS / 1e12:.0f} TFLOPS and read and write "
    f"{MEMORY_BANDWIDTH / 1e12:.2f} TB/s; rq encodes and decodes rows at {CODEC_SHARE:.0%} of that "
    f"and takes {MESSAGE_S * 1e6:.0f} us for a message; links at their nominal bandwidths; "
    "balanced load; bfloat16 rows; as many expert-parallel ranks as there are experts, up to 64."
)


def codec_speeds(
    memory_bandwidth: float, value_bytes: int, share: float = CODEC_SHARE
) -> dict[str, CodecSpeed]:
    """Returns assumed speeds of every codec.

    Args:
        memory_bandwidth: bytes per second, read and written.
        value_bytes: of a value of a row.
        share: of rq, dithered and gaussian; identity only copies.
    """
    shares = dict.fromkeys(("bf16", "fp8", "mxfp8"), PYTORCH_CODEC_SHARE)
    shares |= dict.fromkeys(("rq", "dithered", "gaussian"), share) | {"identity": 0.5}
    speed = {name: part * memory_bandwidth / value_bytes for name, part in shares.items()}
    return {name: CodecSpeed(rate, rate, MESSAGE_S) for name, rate in speed.items()}


def machine_of(near: Link, far: Link, value_bytes: int) -> Machine:
    """Returns the accelerator with these links."""
    codecs = codec_speeds(MEMORY_BANDWIDTH, value_bytes)
    return Machine(FLOPS, MEMORY_BANDWIDTH, near, far, codecs)


def layout_of(model: Model, ranks: int, ranks_per_node: int) -> Layout:
    """Returns the layout with as much expert parallelism as ranks and experts allow, up to 64."""
    return Layout(
        ranks,
        min(ranks, model.num_experts, 64),
        ranks_per_node,
        overlap_gradients=True,
        sharded_optimizer=True,
    )
