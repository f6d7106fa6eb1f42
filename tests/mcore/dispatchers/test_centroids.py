"""Clustered rows against Megatron's MoELayer, and against what the clusters themselves say."""

import pytest
import torch
import torch.distributed as dist

from megatron_moe_comp.stats.comm_stats import Column
from tests.mcore.test_moe_layer import (
    EXPERTS,
    HIDDEN,
    MODELS,
    ROUTINGS,
    compressed,
    make_config,
    relative,
    run,
    stock,
)

FINEST = {"moe_lsh_num_hashes": 64}
"""So many hash functions that every row is a cluster of its own."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}
MODELS_OF_LSH = {k: v for k, v in MODELS.items() if k != "padded to capacity"}


def lsh(config, **options):
    return compressed(config, "lsh", **options)


def assert_close(ours, theirs, bound):
    assert relative(ours[0].double(), theirs[0].double()) < bound
    assert relative(ours[1].double(), theirs[1].double()) < bound
    assert ours[2].keys() == theirs[2].keys()
    for name, grad in theirs[2].items():
        assert (grad is None) == (ours[2][name] is None), name
        if grad is not None:
            assert relative(ours[2][name].double(), grad.double()) < bound, name


def alone_equals_stock(rank, model, routing, options):
    config = make_config(**MODELS_OF_LSH[model])
    theirs = run(stock(config), routing, rank)
    layer = lsh(config, **FINEST, **options)
    ours = run(layer, routing, rank)
    clustered = layer.stats.totals()[0, Column.CLUSTERED_ROWS :]
    assert clustered[0] == clustered[1] > 0
    assert clustered[3] == 0  # no residual
    assert_close(ours, theirs, TOLERANCE[config.params_dtype])


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("model", MODELS_OF_LSH)
def test_rows_that_are_their_own_clusters_equal_stock(megatron_pool, model, routing):
    megatron_pool.run(alone_equals_stock, model, routing, {})


@pytest.mark.parametrize(
    "options",
    [
        {"moe_lsh_residual": "identity"},
        {"moe_lsh_refine": 2},
        {"moe_lsh_center": True},
        {"moe_lsh_hash": "cross-polytope"},
        {"moe_lsh_hash": "spherical", "moe_lsh_hash_dim": 16},
        {"moe_lsh_hash": "random"},
        {"moe_lsh_scope": "remote"},
        {"moe_a2a_chunks": 3},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_so_they_do_with_every_option(megatron_pool, options):
    megatron_pool.run(alone_equals_stock, "top2", "learned", options)


def reference(layer, x, probs, routing_map, factor):
    """The layer's output as the paper writes it, on one rank, expert after expert, with autograd.

    Needs the experts of all ranks: they are made equal before.
    """
    dispatcher = layer.token_dispatcher
    rows = torch.cat([x[routing_map[:, e]] for e in range(EXPERTS)])
    home = dispatcher.seen[-1]
    clusters = home.clusters.assignment
    outputs = torch.zeros_like(x)
    first = 0
    for expert in range(EXPERTS):
        tokens = routing_map[:, expert].nonzero()[:, 0]
        ids = clusters[first : first + len(tokens)]
        for c in ids.unique():
            members = tokens[ids == c]
            mean = x[members].mean(dim=0, keepdim=True)
            ones = torch.ones(1, dtype=x.dtype)
            y, _ = layer.experts.local_experts[expert % layer.num_local_experts](mean, ones)
            y = probs[members, expert, None] * (y + factor * (x[members] - mean))
            outputs = outputs.index_add(0, members, y)
        first += len(tokens)
    assert first == len(rows)
    return outputs


def spy_on_clusters(layer):
    dispatcher = layer.token_dispatcher
    dispatcher.seen = []
    count = dispatcher._count_clusters
    dispatcher._count_clusters = lambda groups: (
        dispatcher.seen.append(dispatcher._at_home),
        count(groups),
    )


def equal_experts(layer):
    """Gives all ranks the experts of rank 0, which one rank can then compute alone."""
    with torch.no_grad():
        for parameter in layer.parameters():
            dist.broadcast(parameter.data, 0)


def unequal_inputs(rank, dtype, tokens=16):
    """Rows in a few groups of near equals; ranks differ in number and magnitude."""
    generator = torch.Generator().manual_seed(rank)
    kinds = torch.randn(4, HIDDEN, generator=generator, dtype=dtype)
    kind = torch.randint(4, (tokens - 5 * rank if rank < 2 else tokens,), generator=generator)
    noise = 0.01 * torch.randn(len(kind), HIDDEN, generator=generator, dtype=dtype)
    return (kinds[kind] + noise) * 3.0**rank


def routing(rank, num_tokens, dtype):
    """Unequal loads: expert 0 is everyone's, rank 1 sends no row to the last ranks' experts."""
    generator = torch.Generator().manual_seed(20 + rank)
    routing_map = torch.zeros(num_tokens, EXPERTS, dtype=torch.bool)
    routing_map[:, 0] = True
    last = EXPERTS if rank != 1 else EXPERTS // 2
    others = torch.randint(1, last, (num_tokens, 1), generator=generator)
    routing_map.scatter_(1, others, True)
    logits = torch.randn(num_tokens, EXPERTS, generator=generator, dtype=dtype)
    return routing_map, logits


def forward(layer, x, probs, routing_map):
    """What MoELayer does after the router."""
    rows, p = layer.preprocess(x[:, None], probs, routing_map)
    dispatched, p = layer.dispatch(rows, p)
    output, _ = layer.routed_experts_compute(dispatched, p)
    return layer.postprocess(layer.combine(output), None)[:, 0]


def equals_reference(rank, options, factor):
    config = make_config(params_dtype=torch.float64)
    layer = lsh(config, moe_lsh_num_hashes=1, **options).double()
    equal_experts(layer)
    spy_on_clusters(layer)
    x = unequal_inputs(rank, torch.float64).requires_grad_()
    routing_map, logits = routing(rank, len(x), torch.float64)
    logits.requires_grad_()
    weights = torch.randn(x.shape, dtype=torch.float64)

    def loss(compute):
        probs = logits.softmax(dim=1) * routing_map
        output = compute(probs)
        gradients = torch.autograd.grad((output * weights).sum(), (x, logits))
        return output, *gradients

    ours = loss(lambda probs: forward(layer, x, probs, routing_map))
    assert (
        len(layer.token_dispatcher.seen[-1].clusters)
        < layer.token_dispatcher.seen[-1].clusters.num_rows
    )
    theirs = loss(lambda probs: reference(layer, x, probs, routing_map, factor))
    return [relative(a, b) for a, b in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"moe_lsh_refine": 0}, 0.0),
        ({}, 0.0),
        ({"moe_lsh_residual": "identity"}, 1.0),
        ({"moe_lsh_refine": 2}, 0.0),
        ({"moe_lsh_center": True, "moe_lsh_hash": "cross-polytope"}, 0.0),
        ({"moe_lsh_hash": "spherical"}, 0.0),
        ({"moe_lsh_hash": "random", "moe_lsh_residual": "identity"}, 1.0),
    ],
)
def test_output_and_gradients_equal_the_definition(megatron_pool, options, factor):
    for errors in megatron_pool.run(equals_reference, options, factor):
        assert max(errors) < 1e-12, errors


def gradcheck(rank, options):
    """Numerical gradients with the clusters held, whose change with x has no gradient."""
    config = make_config(params_dtype=torch.float64)
    layer = lsh(config, moe_lsh_num_hashes=1, **options).double()
    dispatcher = layer.token_dispatcher
    x = unequal_inputs(rank, torch.float64).requires_grad_()
    routing_map, logits = routing(rank, len(x), torch.float64)
    logits.requires_grad_()
    forward(layer, x, logits.softmax(dim=1) * routing_map, routing_map)
    held = []
    find = dispatcher._cluster
    dispatcher._cluster = lambda rows, groups: (
        held[0] if held else held.append(find(rows, groups)) or held[0]
    )
    generator = torch.Generator().manual_seed(30 + rank)
    direction = [torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in (x, logits)]
    weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)

    def loss(step):
        at = [v.detach() + step * d for v, d in zip((x, logits), direction, strict=True)]
        at = [v.requires_grad_() for v in at]
        output = forward(layer, at[0], at[1].softmax(dim=1) * routing_map, routing_map)
        return (output * weights).sum(), at

    value, at = loss(0.0)
    gradients = torch.autograd.grad(value, at)
    analytic = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    numeric = (loss(1e-6)[0] - loss(-1e-6)[0]).detach() / 2e-6
    return analytic.item(), numeric.item(), len(held[0]) < held[0].num_rows


@pytest.mark.parametrize("residual", ["none", "identity"])
@pytest.mark.parametrize("refine", [0, 1])
def test_gradcheck_through_the_ranks(megatron_pool, residual, refine):
    options = {"moe_lsh_residual": residual, "moe_lsh_refine": refine}
    for analytic, numeric, clusters in megatron_pool.run(gradcheck, options):
        assert clusters
        assert analytic == pytest.approx(numeric, rel=1e-6)
