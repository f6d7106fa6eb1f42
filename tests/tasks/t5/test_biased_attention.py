"""BiasedDotProductAttention against an einsum in float64, and against the stock class."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

HEADS, HEAD_SIZE, BATCH, QUERIES = 4, 8, 3, 12

CASES = {
    "padded": {},
    "causal": {"causal": True, "keys": QUERIES},
    "grouped queries": {"config": {"num_query_groups": 2}},
    "a bias for each sample": {"bias_batch": BATCH},
    "query-key layer scaling": {
        "config": {"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True}
    },
    "no mask": {"masked": False},
}


def group_of_one():
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def make_attention(cls, tp_group, causal=False, **changes):
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=4,
        hidden_size=HEADS * HEAD_SIZE,
        num_attention_heads=HEADS,
        **{"attention_dropout": 0.0} | changes,
    )
    return cls(
        config=config,
        layer_number=3,
        attn_mask_type=AttnMaskType.causal if causal else AttnMaskType.arbitrary,
        attention_type="self",
        pg_collection=SimpleNamespace(tp=tp_group),
    )


def make_inputs(keys, groups, bias_batch=1, masked=True):
    """Query, key, value, bias (all heads) and mask, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(QUERIES, BATCH, HEADS, HEAD_SIZE)] + 2 * [(keys, BATCH, groups, HEAD_SIZE)]
    shapes.append((bias_batch, HEADS, QUERIES, keys))
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    lengths = torch.tensor([keys, keys - 3, 2])
    mask = (torch.arange(keys) >= lengths[:, None])[:, None, None].expand(-1, -1, QUERIES, -1)
    return tensors, mask if masked else None


def reference(query, key, value, bias, mask):
    """The context of all heads, [sq, b, heads, head size]."""
    key, value = (x.repeat_interleave(HEADS // x.size(2), dim=2) for x in (key, value))
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) / math.sqrt(HEAD_SIZE) + bias
    if mask is not None:
        scores = scores.masked_fill(mask, -torch.inf)
    return torch.einsum("bhqk,kbhd->qbhd", scores.softmax(-1), value)


def heads_of_rank(tensor, dim, world_size, rank):
    return tensor.chunk(world_size, dim)[rank].clone().requires_grad_()


def check_against_einsum(rank, case, tensor_parallel):
    from megatron_moe_comp.tasks.t5.biased_attention import BiasedDotProductAttention

    case = dict(case)
    config, causal, keys = case.pop("config", {}), case.pop("causal", False), case.pop("keys", 7)
    group = dist.group.WORLD if tensor_parallel else group_of_one()
    size, rank = group.size(), group.rank()
    query_groups = config.get("num_query_groups", HEADS)
    if query_groups < size:
        return
    tensors, mask = make_inputs(keys, query_groups, **case)
    expected_inputs = [tensor.double().requires_grad_() for tensor in tensors]
    upper = torch.ones(QUERIES, keys, dtype=torch.bool).triu(1)
    expected = reference(*expected_inputs, upper if causal else mask)
    expected.square().sum().backward()

    attention = make_attention(BiasedDotProductAttention, group, causal, **config)
    head_dims = (2, 2, 2, 1)
    inputs = [heads_of_rank(t, d, size, rank) for t, d in zip(tensors, head_dims, strict=True)]
    *qkv, bias = inputs
    actual = attention(*qkv, None if causal else mask, attention_bias=bias)
    actual.square().sum().backward()

    close = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(actual, expected.chunk(size, 2)[rank].flatten(2), **close)
    for got, whole, dim in zip(inputs, expected_inputs, head_dims, strict=True):
        torch.testing.assert_close(got.grad, whole.grad.chunk(size, dim)[rank], **close)


@pytest.mark.parametrize("tensor_parallel", [False, True], ids=["tp1", "tp"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_an_einsum(megatron_pool, case, tensor_parallel):
    megatron_pool.run(check_against_einsum, case, tensor_parallel)


def run_bfloat16(rank, bias_dtype):
    from megatron_moe_comp.tasks.t5.biased_attention import BiasedDotProductAttention

    tensors, mask = make_inputs(7, HEADS)
    *qkv, bias = (tensor.bfloat16() for tensor in tensors)
    expected = reference(*(tensor.double() for tensor in (*qkv, bias)), mask)
    attention = make_attention(
        BiasedDotProductAttention,
        group_of_one(),
        bf16=True,
        params_dtype=torch.bfloat16,
        attention_softmax_in_fp32=True,
    )
    bias = bias.to(bias_dtype).requires_grad_()
    actual = attention(*qkv, mask, attention_bias=bias)
    actual.sum().backward()
    assert actual.dtype == torch.bfloat16
    assert bias.grad.dtype == bias_dtype
    torch.testing.assert_close(actual.double(), expected.flatten(2), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_keeps_its_type(megatron_pool, bias_dtype):
    megatron_pool.run(run_bfloat16, bias_dtype)


def compare_with_stock(rank):
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from megatron_moe_comp.tasks.t5.biased_attention import BiasedDotProductAttention

    (*qkv, _), mask = make_inputs(7, HEADS)
    results = []
    for cls in (DotProductAttention, BiasedDotProductAttention):
        inputs = [tensor.clone().requires_grad_() for tensor in qkv]
        attention = make_attention(cls, group_of_one(), attention_dropout=0.2)
        model_parallel_cuda_manual_seed(1)
        context = attention(*inputs, mask)
        context.square().sum().backward()
        results.append([context, *(tensor.grad for tensor in inputs)])
    assert all(torch.equal(ours, stock) for ours, stock in zip(*results, strict=True))


def test_without_a_bias_it_is_stock(megatron_pool):
    megatron_pool.run(compare_with_stock)


def compare_with_recomputation(rank):
    from megatron.core.tensor_parallel import checkpoint, model_parallel_cuda_manual_seed

    from megatron_moe_comp.tasks.t5.biased_attention import BiasedDotProductAttention

    tensors, mask = make_inputs(7, HEADS)
    attention = make_attention(BiasedDotProductAttention, group_of_one(), attention_dropout=0.2)
    results = []
    for recompute in (False, True):
        *qkv, bias = (tensor.clone().requires_grad_() for tensor in tensors)

        def forward(*qkv, bias=bias):
            return attention(*qkv, mask, attention_bias=bias)

        model_parallel_cuda_manual_seed(1)
        context = checkpoint(forward, False, *qkv) if recompute else forward(*qkv)
        context.square().sum().backward()
        results.append([context, *(tensor.grad for tensor in (*qkv, bias))])
    assert all(torch.equal(again, once) for once, again in zip(*results, strict=True))
    assert not attention.scale_mask_softmax._forward_pre_hooks, "a bias outlives its call"


def test_recomputation_repeats_it(megatron_pool):
    megatron_pool.run(compare_with_recomputation)


def train_block(rank, recomputation):
    """The output of encoder layers, and the gradients of their weights and of the bias's."""
    from megatron.core.models.common.embeddings.relative_pos_embedding import (
        RelativePositionEmbedding,
    )
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_moe_comp.tasks.t5.biased_attention import carry_bias_gradient
    from megatron_moe_comp.tasks.t5.specs import t5_block_specs

    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    config = TransformerConfig(
        num_layers=3,
        hidden_size=HEADS * HEAD_SIZE,
        num_attention_heads=HEADS,
        init_method_std=0.3,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        transformer_impl="local",
        **recomputation,
    )
    positions = RelativePositionEmbedding(True, torch.nn.init.normal_, HEADS)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    block = TransformerBlock(config, t5_block_specs(config, config)[0], pg_collection=groups)
    block.register_forward_pre_hook(carry_bias_gradient, with_kwargs=True)
    hidden_states = torch.randn(QUERIES, BATCH, HEADS * HEAD_SIZE)
    mask = torch.zeros(1, 1, QUERIES, QUERIES, dtype=torch.bool)
    output = block(
        hidden_states=hidden_states,
        attention_mask=mask,
        attention_bias=positions(QUERIES, QUERIES),
    )
    # Squares would sum to the same after the last norm, whatever the weights.
    (output * torch.randn_like(output)).sum().backward()
    parameters = (*positions.parameters(), *block.parameters())
    return [output.detach(), *(parameter.grad for parameter in parameters)]


RECOMPUTATIONS = {
    "core attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


@pytest.mark.parametrize("recomputation", RECOMPUTATIONS.values(), ids=RECOMPUTATIONS.keys())
def test_layers_recompute_with_a_learnt_bias(megatron_pool, recomputation):
    expected, actual = (megatron_pool.run(train_block, r)[0] for r in ({}, recomputation))
    assert expected[1].abs().max() > 0.01
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
