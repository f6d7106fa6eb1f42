"""Hugging Face's T5 tensors under Megatron's names and in its layouts.

H: hidden size (d_model), F: feed-forward size (d_ff), A: heads, D: head size (d_kv), V: vocabulary.
"""

from collections.abc import Iterator

import torch
from transformers import T5Config

from megatron_moe_comp.tasks.t5.convert.hf_t5_files import ConversionError

Tensors = dict[str, torch.Tensor]

EMBEDDING, HEAD = "shared.weight", "lm_head.weight"
HEAD_OF_MEGATRON = "lm_head.output_layer.weight"
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""Names under which some files hold the embedding again."""

# In the first T5 checkpoints, whose cross-attention does not use it.
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
LISTED = 8
"""How many tensors an error names."""


def megatron_t5_weights(config: T5Config, tensors: Tensors) -> Tensors:
    """Returns float32 weights of a Megatron T5 without tensor parallelism, by parameter name.

    The output layer's weight is among them where it is not the embedding's.

    Raises:
        ConversionError: `tensors` are not those of a T5 with this configuration.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if name != UNUSED}
    embedding = _embedding(tensors)
    head = tensors.pop(HEAD, embedding)
    _check_shapes(tensors | {HEAD: head}, _shapes(config) | {HEAD: embedding.shape})
    tensors = {name: tensor.float() for name, tensor in tensors.items()}

    weights = {"embedding.word_embeddings.weight": tensors[EMBEDDING]}
    if torch.equal(head, embedding):
        weights["lm_head.output_layer.bias"] = torch.zeros(config.vocab_size)
    else:
        weights[HEAD_OF_MEGATRON] = head.float()
    for stack, num_layers in _stacks(config):
        weights[f"{stack}_relative_pos_emb.relative_attention_bias.weight"] = tensors[
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        ]
        for index in range(num_layers):
            block = _under(tensors, f"{stack}.block.{index}.layer.")
            for name, weight in _layer(config, stack, block):
                weights[f"{stack}.layers.{index}.{name}"] = weight
        weights[f"{stack}.final_layernorm.weight"] = tensors[f"{stack}.final_layer_norm.weight"]
    # Where transformers sets this field, it is from tie_word_embeddings, which it then overwrites.
    if getattr(config, "scale_decoder_outputs", config.tie_word_embeddings):
        weights["decoder.final_layernorm.weight"] *= config.d_model**-0.5
    return weights


def _embedding(tensors: Tensors) -> torch.Tensor:
    """Returns the embedding, and leaves it in `tensors` under one name."""
    found = [tensors.pop(name) for name in (EMBEDDING, *COPIES) if name in tensors]
    if not found:
        raise ConversionError(
            f"weights: there is no {EMBEDDING}, the embedding. Give the weights of a whole T5."
        )
    if not all(torch.equal(found[0], other) for other in found[1:]):
        raise ConversionError(
            f"weights: {EMBEDDING} and {' or '.join(COPIES)} differ, and Megatron's T5 has one "
            "embedding. Give a T5 whose encoder and decoder share theirs."
        )
    tensors[EMBEDDING] = found[0]
    return found[0]


def _stacks(config: T5Config) -> tuple[tuple[str, int], tuple[str, int]]:
    return ("encoder", config.num_layers), ("decoder", config.num_decoder_layers)


def _under(tensors: Tensors, prefix: str) -> Tensors:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _layer(config: T5Config, stack: str, block: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the names and weights of a Megatron layer."""
    yield "input_layernorm.weight", block["0.layer_norm.weight"]
    q, k, v, o = (block[f"0.SelfAttention.{name}.weight"] for name in "qkvo")
    yield "self_attention.linear_qkv.weight", _interleave_heads(config, _scaled(config, q), k, v)
    yield "self_attention.linear_proj.weight", o
    if stack == "decoder":
        yield "pre_cross_attn_layernorm.weight", block["1.layer_norm.weight"]
        q, k, v, o = (block[f"1.EncDecAttention.{name}.weight"] for name in "qkvo")
        yield "cross_attention.linear_q.weight", _scaled(config, q)
        yield "cross_attention.linear_kv.weight", _interleave_heads(config, k, v)
        yield "cross_attention.linear_proj.weight", o
    feed_forward = _under(block, "2." if stack == "decoder" else "1.")
    yield "pre_mlp_layernorm.weight", feed_forward["layer_norm.weight"]
    inputs = [
        feed_forward[f"DenseReluDense.{name}.weight"] for name in _feed_forward_inputs(config)
    ]
    yield "mlp.linear_fc1.weight", torch.cat(inputs)
    yield "mlp.linear_fc2.weight", feed_forward["DenseReluDense.wo.weight"]


def _scaled(config: T5Config, query: torch.Tensor) -> torch.Tensor:
    """Returns the query weight for attention that divides the scores by sqrt(D); T5's does not."""
    return query * config.d_kv**0.5


def _interleave_heads(config: T5Config, *weights_AD_H: torch.Tensor) -> torch.Tensor:
    """Returns the weights interleaved by head: for each head its q rows, k rows, v rows."""
    weights_A_D_H = [w.view(config.num_heads, config.d_kv, config.d_model) for w in weights_AD_H]
    return torch.cat(weights_A_D_H, dim=1).flatten(0, 1)


def _feed_forward_inputs(config: T5Config) -> tuple[str, ...]:
    """Returns the input layers of a feed-forward; the first goes through the activation."""
    return ("wi_0", "wi_1") if config.is_gated_act else ("wi",)


def _shapes(config: T5Config) -> dict[str, torch.Size]:
    """Returns the shapes of T5's tensors, but for the output layer's."""
    H, F, A, AD = config.d_model, config.d_ff, config.num_heads, config.num_heads * config.d_kv
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, H)}
    for stack, num_layers in _stacks(config):
        shapes[f"{stack}.final_layer_norm.weight"] = (H,)
        shapes[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (
            config.relative_attention_num_buckets,
            A,
        )
        attentions = ("SelfAttention", "EncDecAttention")[: 2 if stack == "decoder" else 1]
        for layer in (f"{stack}.block.{index}.layer" for index in range(num_layers)):
            for part, attention in enumerate(attentions):
                shapes[f"{layer}.{part}.layer_norm.weight"] = (H,)
                for name in "qkv":
                    shapes[f"{layer}.{part}.{attention}.{name}.weight"] = (AD, H)
                shapes[f"{layer}.{part}.{attention}.o.weight"] = (H, AD)
            last = f"{layer}.{len(attentions)}"
            shapes[f"{last}.layer_norm.weight"] = (H,)
            for name in _feed_forward_inputs(config):
                shapes[f"{last}.DenseReluDense.{name}.weight"] = (F, H)
            shapes[f"{last}.DenseReluDense.wo.weight"] = (H, F)
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def _check_shapes(tensors: Tensors, expected: dict[str, torch.Size]) -> None:
    problems = [
        f"{name} {list(shape)} is missing"
        for name, shape in expected.items()
        if name not in tensors
    ]
    problems += [
        f"{name} {list(tensor.shape)} would be left unused"
        for name, tensor in tensors.items()
        if name not in expected
    ]
    problems += [
        f"{name} is {list(tensor.shape)} in place of {list(expected[name])}"
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name]
    ]
    if problems:
        shown = "; ".join(problems[:LISTED])
        more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise ConversionError(
            f"weights: they are not what config.json describes: {shown}{more}. Give weights and "
            "configuration of one T5, T5 1.1 or Flan-T5."
        )
