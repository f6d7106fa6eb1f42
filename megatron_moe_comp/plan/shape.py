"""Model and Layout: what the cost of a step follows from, also read from Megatron's arguments."""

import math
from argparse import Namespace
from dataclasses import dataclass
from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]

VALUE_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
UNKNOWN_VOCAB = 32768
"""Where only the tokenizer, which is not read, knows."""


@dataclass(frozen=True)
class Stack:
    """Layers that see the same tokens: those of a GPT, or of T5's encoder or decoder."""

    num_layers: int
    num_moe_layers: int
    seq_length: int
    attentions: int = 1
    """Attention blocks of a layer; 2 with cross-attention."""


@dataclass(frozen=True)
class Model:
    """A Mixture-of-Experts transformer, and how much of it a step computes."""

    stacks: tuple[Stack, ...]
    hidden_size: int
    ffn_hidden_size: int
    """Of the layers without experts."""
    moe_ffn_hidden_size: int
    """Of one expert."""
    num_experts: int
    topk: int
    micro_batch_size: float
    num_microbatches: int
    dtype: Dtype = "bfloat16"
    """Of the rows that are dispatched."""
    prob_bytes: int = 4
    """Of a router probability."""
    vocab_size: int = UNKNOWN_VOCAB
    gated: bool = False
    """Whether a feed-forward has three matrices (SwiGLU, GEGLU) instead of two."""
    attention_size: int | None = None
    """Of all query heads together; None: the hidden size."""
    kv_size: int | None = None
    """Of all key heads together; None: as the query heads."""
    shared_expert_size: int = 0
    tied_embeddings: bool = True
    """Whether the output layer has the weights of the input embeddings."""
    recompute: Literal["none", "moe", "full"] = "none"
    """What backward passes compute, and the MoE layers among it send, again."""

    @property
    def value_bytes(self) -> int:
        """Bytes of a value of a row."""
        return VALUE_BYTES[self.dtype]


@dataclass(frozen=True)
class Layout:
    """How the ranks share the work, and which of them are on one node."""

    ranks: int
    expert_parallel: int
    ranks_per_node: int
    tensor_parallel: int = 1
    expert_tensor_parallel: int = 1
    pipeline_parallel: int = 1
    context_parallel: int = 1
    load: float = 1.0
    """Rows of the most loaded expert-parallel rank over the mean."""
    overlap_gradients: bool = False
    """Whether gradients are summed while the backward pass goes on."""
    sharded_optimizer: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError where ranks cannot be divided so."""
        for name in ("ranks", "expert_parallel", "ranks_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')}={getattr(self, name)}: not a number of ranks. "
                    "Use 1 or more."
                )
        dense = self.tensor_parallel * self.pipeline_parallel * self.context_parallel
        experts = self.expert_tensor_parallel * self.pipeline_parallel * self.expert_parallel
        for what, size in (("tensor, pipeline and context", dense), ("expert", experts)):
            if self.ranks % size:
                raise ValueError(
                    f"--ranks={self.ranks}: cannot be divided into {what} parallel groups of "
                    f"{size} ranks. Use a multiple of {size}."
                )
        if self.load < 1:
            raise ValueError(
                f"--load={self.load}: the most loaded rank has at least the mean. Use 1 or more."
            )

    @property
    def near_peers(self) -> int:
        """Other ranks of the expert-parallel group on this node."""
        members = self.ranks_per_node // self.expert_tensor_parallel
        return min(self.expert_parallel, max(1, members)) - 1

    @property
    def far_peers(self) -> int:
        """Ranks of the expert-parallel group on other nodes."""
        return self.expert_parallel - 1 - self.near_peers

    @property
    def sequence_shards(self) -> int:
        """Ranks that share the tokens of a sequence."""
        return self.tensor_parallel * self.context_parallel


def layout_of_args(args: Namespace, ranks: int, ranks_per_node: int, load: float) -> Layout:
    """Returns the Layout that Megatron's arguments, validated or only parsed, ask for."""
    tensor = args.tensor_model_parallel_size
    return Layout(
        ranks,
        args.expert_model_parallel_size,
        ranks_per_node,
        tensor_parallel=tensor,
        expert_tensor_parallel=args.expert_tensor_parallel_size or tensor,
        pipeline_parallel=args.pipeline_model_parallel_size,
        context_parallel=args.context_parallel_size,
        load=load,
        overlap_gradients=args.overlap_grad_reduce,
        sharded_optimizer=args.use_distributed_optimizer,
    )


def model_of_args(args: Namespace, layout: Layout) -> Model:
    """Returns the Model that Megatron's arguments, validated or only parsed, ask for.

    Raises:
        ValueError: the model has no experts.
    """
    if args.num_experts is None:
        raise ValueError(
            "--num-experts: there is no expert all-to-all to plan for in a model without experts. "
            "Set it."
        )
    gated = args.swiglu or getattr(args, "t5_activation", None) == "geglu"
    hidden, heads = args.hidden_size, args.num_attention_heads
    # As Megatron's validation fills it in.
    swiglu_size = int(4 * hidden * 2 / 3 / 64) * 64
    ffn = args.ffn_hidden_size or (swiglu_size if args.swiglu else 4 * hidden)
    channels = args.kv_channels or hidden // heads
    groups = args.num_query_groups if args.group_query_attention else heads
    dtype: Dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    prob_bytes = {"fp32": 4, "fp64": 8}.get(args.moe_router_dtype, VALUE_BYTES[dtype])
    replicas = layout.ranks // (layout.sequence_shards * layout.pipeline_parallel)
    samples = args.global_batch_size or args.micro_batch_size * replicas
    return Model(
        _stacks_of_args(args),
        hidden,
        ffn,
        args.moe_ffn_hidden_size or ffn,
        args.num_experts,
        args.moe_router_topk,
        args.micro_batch_size,
        max(1, samples // (args.micro_batch_size * replicas)),
        dtype=dtype,
        prob_bytes=prob_bytes,
        vocab_size=getattr(args, "padded_vocab_size", None) or args.vocab_size or UNKNOWN_VOCAB,
        gated=gated,
        attention_size=channels * heads,
        kv_size=channels * (groups or heads),
        shared_expert_size=args.moe_shared_expert_intermediate_size or 0,
        tied_embeddings=not args.untie_embeddings_and_output_weights,
        recompute=_recompute_of_args(args),
    )


def _stacks_of_args(args: Namespace) -> tuple[Stack, ...]:
    """Returns the stacks; a T5's flags are known only to its own script."""
    if not hasattr(args, "t5_activation"):
        number = args.num_layers
        return (Stack(number, _moe_layers(args, number), args.seq_length),)
    encoder = args.encoder_num_layers or args.num_layers
    decoder = args.decoder_num_layers or encoder
    length = args.encoder_seq_length or args.seq_length
    return (
        Stack(encoder, _moe_layers(args, encoder), length),
        Stack(decoder, _moe_layers(args, decoder), args.decoder_seq_length or length, attentions=2),
    )


def _moe_layers(args: Namespace, num_layers: int) -> int:
    """Returns how many of so many layers have experts."""
    pattern = args.moe_layer_freq
    return math.ceil(num_layers / pattern) if isinstance(pattern, int) else sum(pattern)


def _recompute_of_args(args: Namespace) -> Literal["none", "moe", "full"]:
    if args.recompute_granularity == "full":
        return "full"
    selective = args.recompute_granularity == "selective"
    return "moe" if selective and "moe" in (args.recompute_modules or ()) else "none"
