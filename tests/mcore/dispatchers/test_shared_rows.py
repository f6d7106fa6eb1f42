"""Rows that cross once per rank against the plain dispatcher, forward and backward."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_comp.mcore.dispatchers.shared_rows import _pack_bits, _unpack_bits
from megatron_moe_comp.stats.comm_stats import Column
from tests.mcore.test_moe_layer import (
    EXPERTS,
    MODELS,
    ROUTINGS,
    assert_same_bits,
    compressed,
    make_config,
    relative,
    run,
    stock,
)

DEDUP = {"moe_a2a_dedup": True}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 0.02}
MODELS_OF_DEDUP = {k: v for k, v in MODELS.items() if k != "padded to capacity"} | {
    "top4": {"moe_router_topk": 4},
    "all experts": {"moe_router_topk": EXPERTS},
}


@given(num_rows=st.integers(0, 5), size=st.integers(1, 40), seed=st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_unpack_bits_inverts_pack_bits(num_rows, size, seed):
    mask = torch.rand(num_rows, size, generator=torch.Generator().manual_seed(seed)) < 0.5
    octets = _pack_bits(mask)
    assert octets.dtype == torch.uint8
    assert octets.shape == (num_rows, -(-size // 8))
    assert torch.equal(_unpack_bits(octets, size), mask)


def equals_plain(rank, model, routing):
    config = make_config(**MODELS_OF_DEDUP[model])
    theirs = run(stock(config), routing, rank)
    layer = compressed(config, "identity", **DEDUP)
    ours = run(layer, routing, rank)
    bound = TOLERANCE[config.params_dtype]
    assert relative(ours[0].float(), theirs[0].float()) < bound
    assert relative(ours[1].float(), theirs[1].float()) < bound
    assert ours[2].keys() == theirs[2].keys()
    for name, grad in theirs[2].items():
        assert (grad is None) == (ours[2][name] is None), name
        if grad is not None:
            assert relative(ours[2][name].float(), grad.float()) < bound, name


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("model", MODELS_OF_DEDUP)
def test_dedup_equals_plain_up_to_the_order_of_additions(megatron_pool, model, routing):
    megatron_pool.run(equals_plain, model, routing)


def bytes_saved(rank, topk):
    """What crosses without and with dedup, and the duplicates counted from the routing itself."""
    config = make_config(moe_router_topk=topk, moe_router_pre_softmax=topk == 1)
    plain, dedup = compressed(config, "identity"), compressed(config, "identity", **DEDUP)
    size = dist.get_world_size()
    duplicates = []
    preprocess = dedup.token_dispatcher.preprocess

    def spy(routing_map):
        per_rank = routing_map.view(len(routing_map), size, -1).sum(dim=2)
        per_rank[:, rank] = 0
        duplicates.append(int((per_rank - 1).clamp(min=0).sum()))
        return preprocess(routing_map)

    dedup.token_dispatcher.preprocess = spy
    for layer in (plain, dedup):
        run(layer, rank=rank)
    totals = [layer.stats.totals() for layer in (plain, dedup)]
    assert torch.equal(totals[0][:, Column.RAW], totals[1][:, Column.RAW])
    return totals[0], totals[1], duplicates[0]


@pytest.mark.parametrize("topk", [1, 2, 4])
def test_the_bytes_saved_are_those_of_the_duplicates(megatron_pool, topk):
    results = megatron_pool.run(bytes_saved, topk)
    plain, dedup = (sum(r[i] for r in results) for i in (0, 1))
    duplicates = sum(r[2] for r in results)
    assert (duplicates > 0) == (topk > 1)
    assert torch.equal(
        plain[:, Column.ROWS] - dedup[:, Column.ROWS], torch.full((4,), duplicates).double()
    )
    row_bytes = 64 * 4
    for wire, saved in enumerate(plain[:, Column.WIRE] - dedup[:, Column.WIRE]):
        # The forward dispatch also carries a byte of mask per row; sections are padded to 16 bytes.
        masks = dedup[0, Column.ROWS] if wire == 0 else 0
        padding = len(results) ** 2 * 3 * 16
        assert abs(saved - duplicates * row_bytes + masks) <= padding


def composes(rank, options):
    config = make_config(moe_router_topk=4)
    theirs = run(stock(config), rank=rank)
    first, second = (run(compressed(config, **DEDUP, **options), rank=rank) for _ in range(2))
    assert relative(first[0], theirs[0]) < 0.1
    assert relative(first[1], theirs[1]) < 0.1
    assert_same_bits(first, second)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "birdmoe", "moe_a2a_bits": 8, "moe_a2a_min_bits": 7},
        {"method": "rq", "moe_a2a_bits": 7, "moe_a2a_chunks": 2},
        {"method": "rq", "moe_a2a_bits": 8, "moe_a2a_scale_per": "chunk"},
        {"method": "bf16"},
        {"method": "mxfp8"},
    ],
    ids=lambda options: options["method"],
)
def test_dedup_composes_with_every_codec(megatron_pool, options):
    megatron_pool.run(composes, options)
