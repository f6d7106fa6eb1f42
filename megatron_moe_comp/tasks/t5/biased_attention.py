"""Megatron's local attention with an additive bias, which T5's relative positions need."""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlock


class BiasedDotProductAttention(DotProductAttention):
    """Core attention that adds ``attention_bias`` to the scaled scores before mask and softmax.

    Without a bias it is ``DotProductAttention``, bit for bit.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Returns the context, [sq, b, heads · head size].

        Args:
            query: [sq, b, heads, head size], of this tensor parallel rank as all the others.
            key: [sk, b, query groups, head size].
            value: [sk, b, query groups, head size].
            attention_mask: [1 or b, 1, sq, sk], True where a score is left out.
            attn_mask_type: not used, as in the stock class.
            attention_bias: [1 or b, heads, sq, sk].
            packed_seq_params: refused, as in the stock class.
        """
        inputs = (query, key, value, attention_mask, attn_mask_type, None, packed_seq_params)
        if attention_bias is None:
            return super().forward(*inputs)
        # Query-key layer scaling leaves the scores divided by this, which the softmax undoes.
        score_divisor = self.scale_mask_softmax.scale or 1.0

        def add_bias(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            # In place: the product's backward does not need the scores, and they are the largest
            # tensor here.
            return args[0].add_(attention_bias, alpha=1 / score_divisor), *args[1:]

        with self.scale_mask_softmax.register_forward_pre_hook(add_bias):
            return super().forward(*inputs)


def carry_bias_gradient(
    block: TransformerBlock, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns a block's arguments with a bias that recomputation can differentiate (a pre-hook).

    Megatron recomputes attention with the bias as a constant of the recomputed function. Each layer
    then runs the backward of what the bias was made by, and the second finds it freed. Here
    the layers see a leaf, which collects their gradients; they go on once when all are there.
    """
    bias, config = kwargs["attention_bias"], block.config
    recomputes = config.recompute_granularity == "full" or (
        config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
    )
    if bias is None or not bias.requires_grad or not recomputes:
        return args, kwargs
    leaf = bias.detach().requires_grad_()
    hidden_states = _GradientOfLeaf.apply(kwargs["hidden_states"], bias, leaf)
    return args, kwargs | {"hidden_states": hidden_states, "attention_bias": leaf}


class _GradientOfLeaf(torch.autograd.Function):
    """Passes hidden states on; its backward, the last of a block, passes on the leaf's gradient."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden_states: torch.Tensor,
        bias: torch.Tensor,
        leaf: torch.Tensor,
    ) -> torch.Tensor:
        ctx.leaf = leaf
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        gradient: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        return gradient, ctx.leaf.grad, None
