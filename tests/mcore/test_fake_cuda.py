"""The dispatchers on a GPU that is not there, against the same ranks' run on the CPU."""

from collections import Counter
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.moe_utils import maybe_move_tensor_to_cpu

from megatron_moe_comp.comm import all_to_all
from tests.fake_backward import backward
from tests.fake_gpu import CUDA_KERNELS, fake_gpu, values
from tests.mcore.test_moe_layer import BATCH, HIDDEN, TOKENS, compressed, make_config


@contextmanager
def watched_splits():
    """Yields the dtypes and the splits of all-to-alls."""
    seen = []
    exchange, collective = all_to_all.exchange, dist.all_to_all_single

    def exchange_spy(buffer, input_splits, output_splits, group):
        seen.append((buffer.dtype, tuple(input_splits), tuple(output_splits)))
        return exchange(buffer, input_splits, output_splits, group)

    def collective_spy(output, values, output_split_sizes=None, input_split_sizes=None, **kwargs):
        if values.dtype != torch.uint8:  # not an exchange's
            splits = (input_split_sizes, output_split_sizes)
            seen.append((values.dtype, *(s and tuple(map(int, s)) for s in map(_listed, splits))))
        return collective(output, values, output_split_sizes, input_split_sizes, **kwargs)

    with (
        patch.object(all_to_all, "exchange", exchange_spy),
        patch.object(dist, "all_to_all_single", collective_spy),
    ):
        yield seen


def _listed(splits):
    return None if splits is None else list(splits)


def rows_of(rank, config):
    """Hidden states, routing map and probabilities of a rank."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(TOKENS, BATCH, HIDDEN, generator=generator)
    # Similar tokens, for clusters.
    x = (x[: TOKENS // 4].repeat(4, 1, 1) + 1e-3 * x).to(config.params_dtype)
    scores = torch.randn(TOKENS * BATCH, config.num_moe_experts, generator=generator)
    scores[:, 0] += 1
    chosen = scores.topk(config.moe_router_topk, dim=1).indices
    routing_map = torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)
    if config.moe_expert_capacity_factor:
        routing_map[::3] = False
    return x, routing_map, scores.softmax(dim=1) * routing_map


def through(dispatcher, x, routing_map, probs):
    """The output of a layer whose experts scale rows by two and their probabilities."""
    dispatcher.start_pass(1, training=True)
    rows, probs = dispatcher.dispatch_preprocess(x, routing_map, probs)
    rows, probs = dispatcher.token_dispatch(rows, probs)
    rows, per_expert, probs = dispatcher.dispatch_postprocess(rows, probs)
    assert per_expert.device.type == "cpu"
    assert per_expert.sum() == len(rows)
    if dispatcher.config.moe_router_padding_for_quantization:
        assert (per_expert % 16 == 0).all()
    outputs = dispatcher.combine_preprocess((rows * 2 * probs[:, None]).to(rows.dtype))
    return dispatcher.combine_postprocess(dispatcher.token_combine(outputs))


def traced(rank, model, method, options, kernels):
    """Where the host waits; the fake GPU's bytes, output and gradients are those of the CPU."""
    config = make_config(**{k: v for k, v in model.items() if k not in FP8})
    layers = [compressed(config, method, **options) for _ in range(2)]
    # Experts of fp8 cannot be built without Transformer Engine.
    vars(config).update({k: v for k, v in model.items() if k in FP8})
    x, routing_map, probs = rows_of(rank, config)
    x.requires_grad_()
    probs.requires_grad_()
    weights = torch.linspace(-1, 1, x.numel()).view(x.shape).to(x.dtype)
    with watched_splits() as expected:
        # Padding for fp8 writes into the map.
        output = through(layers[0].token_dispatcher, x, routing_map.clone(), probs)
        output.backward(weights)
    dispatcher = layers[1].token_dispatcher
    dispatcher.stats.phases.start()
    with (
        fake_gpu(kernels) as gpu,
        patch.object(dispatcher, "cuda_dtoh_stream", gpu.side),
        patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", maybe_move_tensor_to_cpu),
        watched_splits() as sent,
    ):
        inputs = [gpu.tensor(t) for t in (x, routing_map, probs)]
        fake = through(dispatcher, *inputs)
        grads = backward(fake, gpu.tensor(weights))
    assert sent == expected
    assert len(sent) == (4 * options.get("moe_a2a_chunks", 1) if method != "none" else 6)
    for ours, theirs in (
        (fake, output),
        (grads[inputs[0]], x.grad),
        (grads[inputs[2]], probs.grad),
    ):
        assert ours.device.type == "cuda"
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert torch.equal(values(ours), theirs)
    return Counter(gpu.waits)


COUNTS = {"the dispatcher's event": 1}
CLUSTERS = "clustering._of_sorted_keys: copy to the host"
REFINED = COUNTS | {CLUSTERS: 2}
CAPACITY = {"moe_expert_capacity_factor": 4.0}
FP8 = {"moe_router_padding_for_quantization": True, "fp8": "hybrid", "fp8_recipe": "delayed"}
BFLOAT16 = {"bf16": True, "params_dtype": torch.bfloat16}
CASES = {
    "none": ({}, "none", {}, COUNTS),
    "none, padded to capacity": (
        CAPACITY | {"moe_pad_expert_input_to_capacity": True},
        "none",
        {},
        {},
    ),
    "birdmoe": ({}, "birdmoe", {}, COUNTS),
    "birdmoe, backward of other bits": (
        BFLOAT16,
        "birdmoe",
        {"moe_a2a_backward_bits": 8, "moe_a2a_chunks": 3},
        COUNTS,
    ),
    "birdmoe, capacity": (CAPACITY, "birdmoe", {}, COUNTS),
    "birdmoe, padded to capacity": (
        CAPACITY | {"moe_pad_expert_input_to_capacity": True},
        "birdmoe",
        {},
        {},
    ),
    "between nodes": (
        {},
        "gaussian",
        {"moe_a2a_scope": "inter-node", "moe_a2a_ranks_per_node": 2, "moe_a2a_chunks": 2},
        COUNTS,
    ),
    "padded for fp8": (FP8, "birdmoe", {}, COUNTS),
    "one wire": (BFLOAT16, "mxfp8", {"moe_a2a_wires": ("combine_fwd",)}, COUNTS),
    "dedup": ({}, "birdmoe", {"moe_a2a_dedup": True}, COUNTS),
    "dedup, top 4 in chunks": (
        BFLOAT16 | {"moe_router_topk": 4},
        "int8",
        {"moe_a2a_dedup": True, "moe_a2a_chunks": 2},
        COUNTS,
    ),
    "dedup, capacity": (CAPACITY, "rq", {"moe_a2a_dedup": True}, COUNTS),
    "lsh": ({}, "lsh", {}, REFINED),
    "lsh, not refined": (BFLOAT16, "lsh", {"moe_lsh_refine": 0}, COUNTS | {CLUSTERS: 1}),
    "lsh, centered and dense": (
        {},
        "lsh",
        {"moe_lsh_center": True, "moe_lsh_hash": "cross-polytope", "moe_a2a_codec": "dithered"},
        REFINED,
    ),
    "lsh, residual in chunks": (
        {},
        "lsh",
        {"moe_lsh_residual": "identity", "moe_a2a_chunks": 2},
        REFINED,
    ),
    "lsh, capacity, between nodes": (
        CAPACITY,
        "lsh",
        {"moe_lsh_scope": "inter-node", "moe_a2a_ranks_per_node": 2},
        REFINED | {"centroids.dispatch_preprocess: _local_scalar_dense": 1},
    ),
    "lsh, random": (
        {},
        "lsh",
        {"moe_lsh_hash": "random"},
        COUNTS | {CLUSTERS: 1, "clustering.shuffled: nonzero": 1},
    ),
    "lsh, remote, in chunks": (
        BFLOAT16,
        "lsh",
        {"moe_lsh_scope": "remote", "moe_a2a_chunks": 2},
        REFINED,
    ),
}
"""Model, method, options, and all waits of the host for the device, forward and backward."""


four_ranks = pytest.mark.parametrize("megatron_pool", [4], ids=["ep4"], indirect=True)


@four_ranks
@pytest.mark.parametrize("case", CASES)
def test_dispatchers(megatron_pool, case):
    model, method, options, waits = CASES[case]
    assert megatron_pool.run(traced, model, method, options, CUDA_KERNELS) == [waits] * 4


@four_ranks
@pytest.mark.parametrize("case", ["lsh"])
def test_dispatchers_without_kernels(megatron_pool, case):
    model, method, options, waits = CASES[case]
    assert megatron_pool.run(traced, model, method, options, frozenset()) == [waits] * 4
