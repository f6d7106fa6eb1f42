"""Clustering together with codecs, scopes, recomputation and evaluation, and on awkward rows."""

import pytest
import torch
import torch.distributed as dist

from megatron_moe_comp.stats.comm_stats import Column
from tests.mcore.dispatchers.test_centroids import (
    forward,
    lsh,
    spy_on_clusters,
)
from tests.mcore.test_moe_layer import (
    BATCH,
    EXPERTS,
    HIDDEN,
    TOKENS,
    Collectives,
    assert_same_bits,
    counts,
    make_config,
    relative,
    run,
    stock,
)

COARSE = {"moe_lsh_num_hashes": 1}


def duplicates(rank, options):
    """Every row three times: rows sent, and whether outputs and gradients of copies are equal."""
    layer = lsh(make_config(), moe_lsh_num_hashes=64, **options)
    generator = torch.Generator().manual_seed(rank)
    x = torch.rand(TOKENS, BATCH, HIDDEN, generator=generator).repeat(3, 1, 1).requires_grad_()
    output, _ = layer(x)
    (output * output.detach()).sum().backward()
    sent, rows = layer.stats.totals()[0, [Column.ROWS, Column.PAIRS]].tolist()
    copies = [*output.detach().split(TOKENS), *x.grad.split(TOKENS)]
    equal = torch.equal(copies[0], copies[1]) and torch.equal(copies[0], copies[2])
    # The router's own gradient of each copy is computed in blocks of rows.
    same_gradient = torch.allclose(copies[3], copies[4], rtol=1e-4, atol=1e-6)
    return sent, rows, equal, same_gradient


@pytest.mark.parametrize("options", [{}, {"moe_lsh_residual": "identity"}, {"moe_lsh_refine": 0}])
def test_duplicates_are_sent_once_and_get_equal_outputs(megatron_pool, options):
    for sent, rows, equal, same_gradient in megatron_pool.run(duplicates, options):
        assert 3 * sent == rows > 0
        assert equal
        assert same_gradient


def awkward(rank, kind):
    layer = lsh(make_config(), **COARSE)
    tokens = {"no rows on one rank": 0 if rank == 1 else 6, "one row": 1}.get(kind, 6)
    x = torch.rand(tokens, 1, HIDDEN, generator=torch.Generator().manual_seed(rank))
    if kind == "all equal":
        x = x[:1].expand_as(x).contiguous()
    if kind == "not finite" and rank == 0:
        x[2, 0, 5] = torch.nan
    x.requires_grad_()
    probs = torch.zeros(tokens, EXPERTS)
    probs[:, [1, EXPERTS - 1]] = torch.tensor([0.7, 0.3])
    output = forward(layer, x[:, 0], probs, probs > 0)
    output.nan_to_num().sum().backward()
    clusters = layer.stats.totals()[0, Column.CENTROIDS]
    return output.isnan().any(dim=1).tolist(), x.grad.isnan().any().item(), clusters.item()


@pytest.mark.parametrize("kind", ["no rows on one rank", "one row", "all equal", "not finite"])
def test_awkward_rows(megatron_pool, kind):
    results = megatron_pool.run(awkward, kind)
    for rank, (is_nan, _, clusters) in enumerate(results):
        # A row that is not finite is a cluster of its own and spoils no other row.
        assert is_nan == [kind == "not finite" and rank == 0 and i == 2 for i in range(len(is_nan))]
        if kind == "all equal":
            assert clusters == 2
        if kind == "one row":
            assert clusters == 2


CLUSTERING = ("CLUSTERED_ROWS", "CENTROIDS", "CLUSTERED_SQUARE", "RESIDUAL_SQUARE", "FLOPS_SAVED")


def recompute_repeats(rank, options):
    recomputing = make_config(recompute_granularity="selective", recompute_modules=["moe"])
    layers = [lsh(config, **options) for config in (make_config(), recomputing)]
    results = [run(layer, rank=rank) for layer in layers]
    measured = [layer.token_dispatcher.take_measurement() for layer in layers]
    columns = [column for column in Column if column.name in CLUSTERING]
    figures = [layer.stats.totals()[:, columns] for layer in layers]
    assert_same_bits(*results)
    assert torch.equal(*measured)
    assert torch.equal(*figures)


@pytest.mark.parametrize(
    "options",
    [
        {"moe_lsh_residual": "identity", "moe_lsh_refine": 1},
        {"moe_lsh_hash": "random"},
        {"moe_a2a_codec": "rq", "moe_a2a_bits": 4},
    ],
)
def test_recomputation_repeats_clusters_and_counts_them_once(megatron_pool, options):
    megatron_pool.run(recompute_repeats, COARSE | options)


def composes(rank, options):
    """Distance of centroids through a codec from centroids unchanged, and their bytes."""
    config = make_config()
    without_codec = {k: v for k, v in options.items() if k.startswith("moe_lsh")}
    layers = [lsh(config, **COARSE, **kept) for kept in (without_codec, options)]
    plain, coded = (run(layer, rank=rank) for layer in layers)
    assert_same_bits(run(lsh(config, **COARSE, **options), rank=rank), coded)
    totals = [layer.stats.totals().sum(dim=0) for layer in layers]
    return (
        relative(coded[0], plain[0]),
        relative(coded[1], plain[1]),
        torch.equal(totals[0][: Column.RAW + 1], totals[1][: Column.RAW + 1]),
        (totals[1][Column.WIRE] / totals[0][Column.WIRE]).item(),
    )


@pytest.mark.parametrize(
    ("options", "error", "share"),
    [
        ({"moe_a2a_codec": "rq", "moe_a2a_bits": 8}, 0.05, 0.35),
        ({"moe_a2a_codec": "rq", "moe_a2a_bits": 4}, 0.6, 0.25),
        ({"moe_a2a_codec": "rq", "moe_a2a_bit_policy": "optimal"}, 0.6, 0.35),
        ({"moe_a2a_codec": "mxfp8", "moe_a2a_chunks": 2}, 0.1, 0.4),
        ({"moe_a2a_codec": "bf16"}, 0.02, 0.6),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_centroids_go_through_every_kind_of_codec(megatron_pool, options, error, share):
    for output, gradient, same_raw, sent in megatron_pool.run(composes, options):
        assert 0 < output < error
        assert 0 < gradient < error
        assert same_raw
        assert sent < share


def scoped(rank, options):
    layer = lsh(make_config(), **COARSE, **options)
    spy_on_clusters(layer)
    run(layer, rank=rank)
    home = layer.token_dispatcher.seen[-1]
    per_expert = home.clusters.num_per_expert.tolist()
    clustered = layer.token_dispatcher._clustered
    sizes = home.clusters.offsets.diff()
    first = 0
    largest = []
    for count in per_expert:
        largest.append(int(sizes[first : first + count].max()) if count else 0)
        first += count
    return clustered, largest, layer.stats.totals()[0, Column.CLUSTERED_ROWS].item()


@pytest.mark.parametrize(
    "options",
    [
        {"moe_lsh_scope": "all"},
        {"moe_lsh_scope": "remote"},
        {"moe_lsh_scope": "inter-node", "moe_a2a_ranks_per_node": 2},
    ],
    ids=lambda options: options["moe_lsh_scope"],
)
def test_only_rows_in_the_scope_are_clustered(megatron_pool, options):
    results = megatron_pool.run(world_size)
    size = results[0]
    if options["moe_lsh_scope"] == "inter-node" and size == 2:
        with pytest.raises(AssertionError, match="--moe-lsh-scope=inter-node: all 2"):
            megatron_pool.run(scoped, options)
        return
    per_rank = EXPERTS // size
    node = {"all": 0, "remote": 1, "inter-node": 2}[options["moe_lsh_scope"]]
    for rank, (clustered, largest, rows) in enumerate(megatron_pool.run(scoped, options)):
        for expert, (is_clustered, most) in enumerate(zip(clustered, largest, strict=True)):
            inside = bool(node) and expert // per_rank // node == rank // node
            assert is_clustered != inside
            assert most <= 1 or is_clustered
        assert max(largest) > 1
        assert (rows < 2 * TOKENS * BATCH) == bool(node)


def world_size(rank):
    return dist.get_world_size()


def evaluation(rank, options):
    config = make_config()
    theirs, ours = stock(config), lsh(config, **COARSE, **options)
    x = torch.rand(TOKENS, BATCH, HIDDEN, generator=torch.Generator().manual_seed(rank))
    with torch.no_grad():
        outputs = [layer.eval()(x)[0] for layer in (theirs, ours)]
    assert not ours.stats.totals().any()
    assert not ours.token_dispatcher.take_measurement().any()
    return torch.equal(*outputs)


def test_evaluation_does_not_cluster_unless_asked(megatron_pool):
    assert all(megatron_pool.run(evaluation, {}))
    assert not any(megatron_pool.run(evaluation, {"moe_lsh_eval": True}))


def collectives(rank, options):
    layer = lsh(make_config(), **COARSE, **options) if options is not None else stock(make_config())
    with Collectives() as found:
        layer(torch.rand(TOKENS, BATCH, HIDDEN))
    return found.beside_rows()


def test_clustering_needs_no_further_collective(megatron_pool):
    stocks = megatron_pool.run(collectives, None)
    assert megatron_pool.run(collectives, {}) == stocks


def test_counted_bytes_are_those_handed_to_the_collectives(megatron_pool):
    for found, handed, counted, raw in megatron_pool.run(counts_of_lsh):
        assert found == 4
        assert counted == handed
        assert raw > handed


def counts_of_lsh(rank):
    return counts(rank, "lsh", **COARSE)
