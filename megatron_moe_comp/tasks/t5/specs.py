"""Layer specs of T5-MoE: Megatron's T5 layers, with an MoE layer in place of some feed-forwards.

Megatron's own T5 specs know no experts, and its local ones build no norm after the last layer.
"""

from dataclasses import replace
from functools import partial

import torch
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.T5.t5_spec import (
    LNImpl,
    decoder_model_with_local_spec,
    decoder_model_with_transformer_engine_default_spec,
    encoder_model_with_local_spec,
    encoder_model_with_transformer_engine_default_spec,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_moe_comp.tasks.t5.biased_attention import BiasedDotProductAttention

PRE_MLP_NORM = "pre_mlp_layernorm."


def moe_layer_pattern(moe_layer_freq: int | list[int], num_layers: int) -> list[int]:
    """Returns which layers of a stack have experts: 1, or 0 for a dense layer.

    Args:
        moe_layer_freq: Megatron's --moe-layer-freq, for encoder and decoder alike: N for layers 0,
            N, 2N, ..., or a list with an entry per layer.
        num_layers: layers of the stack.

    Raises:
        ValueError: the list has another length, or values other than 0 and 1.
    """
    if isinstance(moe_layer_freq, int):
        return [int(i % moe_layer_freq == 0) for i in range(num_layers)]
    if len(moe_layer_freq) != num_layers or not set(moe_layer_freq) <= {0, 1}:
        raise ValueError(
            f"--moe-layer-freq={moe_layer_freq}: a list must have a 0 or 1 for each of the "
            f"{num_layers} layers of the encoder, and the same holds for the decoder. Write one "
            "number, or give both stacks as many layers as the list has entries."
        )
    return list(moe_layer_freq)


def t5_block_specs(
    encoder: TransformerConfig, decoder: TransformerConfig
) -> tuple[TransformerBlockSubmodules, TransformerBlockSubmodules]:
    """Returns the specs of the encoder's and of the decoder's layers and final norms.

    Args:
        encoder: its `moe_layer_freq` is a list if there are experts, see `moe_layer_pattern`.
        decoder: the same for the decoder.
    """
    if decoder.transformer_impl == "transformer_engine":
        layers = (
            encoder_model_with_transformer_engine_default_spec(),
            decoder_model_with_transformer_engine_default_spec(),
        )
        final_norm = TENorm
    else:
        layers = (encoder_model_with_local_spec(), decoder_model_with_local_spec())
        # Apex's norm has no RMSNorm.
        norm = WrappedTorchNorm if decoder.normalization == "RMSNorm" else LNImpl
        layers = tuple(_with_attention_bias(_with_norm(layer, norm)) for layer in layers)
        final_norm = norm
    blocks = []
    for config, layer in zip((encoder, decoder), layers, strict=True):
        if config.num_moe_experts is None:
            specs = [layer] * config.num_layers
        else:
            moe = _with_experts(layer, config)
            specs = [moe if has_experts else layer for has_experts in config.moe_layer_freq]
        blocks.append(TransformerBlockSubmodules(layer_specs=specs, layer_norm=final_norm))
    return blocks[0], blocks[1]


def _with_norm(layer: ModuleSpec, norm: type) -> ModuleSpec:
    names = ("input_layernorm", "pre_cross_attn_layernorm", "pre_mlp_layernorm")
    used = [name for name in names if getattr(layer.submodules, name) is LNImpl]
    return replace(layer, submodules=replace(layer.submodules, **dict.fromkeys(used, norm)))


def _with_attention_bias(layer: ModuleSpec) -> ModuleSpec:
    """Returns the layer with a self-attention that takes the bias of relative positions."""
    attention = layer.submodules.self_attention
    biased = replace(attention.submodules, core_attention=BiasedDotProductAttention)
    changes = {"self_attention": replace(attention, submodules=biased)}
    return replace(layer, submodules=replace(layer.submodules, **changes))


class PaddedTopKRouter(TopKRouter):
    """Megatron's router, whose count of tokens for the expert bias fails if some are padding."""

    def _apply_expert_bias(
        self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> None:
        """Counts the tokens of each expert, as stock: it lacks the dimension of experts here."""
        if padding_mask is not None:
            padding_mask = padding_mask[:, None]
        super()._apply_expert_bias(routing_map, padding_mask)


def _with_experts(layer: ModuleSpec, config: TransformerConfig) -> ModuleSpec:
    """Returns the layer with experts in place of its feed-forward."""
    use_te = config.transformer_impl == "transformer_engine"
    submodules = layer.submodules
    moe = get_moe_module_spec(
        use_te=use_te,
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
    )
    parts = replace(moe.keywords["submodules"], router=PaddedTopKRouter)
    changes = {
        "mlp": partial(moe.func, submodules=parts),
        # A norm in front of experts is a module of its own, with Transformer Engine too, and goes
        # by that name in checkpoints.
        "sharded_state_dict_keys_map": {
            old: new
            for old, new in submodules.sharded_state_dict_keys_map.items()
            if old != PRE_MLP_NORM
        },
    }
    if use_te:
        changes["pre_mlp_layernorm"] = TENorm
    return replace(layer, submodules=replace(submodules, **changes))
