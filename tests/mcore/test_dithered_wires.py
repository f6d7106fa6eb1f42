"""Dithered rows through every dispatcher: the receiver knows the sender's random numbers."""

from functools import partial

import pytest
import torch
import torch.distributed as dist

from megatron_moe_comp.comm import all_to_all
from tests.mcore.test_moe_layer import compressed, make_config, run

LSH = {"method": "lsh", "moe_lsh_num_hashes": 1, "moe_lsh_hash_dim": 4}


def checked_send(wires, rows, probs, masks, route, message, stats, *, original):
    """Asserts that every value arrives half a step off at most; other random bits would show."""
    got = original(rows, probs, masks, route, message, stats)
    sent, received = route.sent.rows, route.received.rows
    exact = rows.new_empty((sum(received), rows.shape[1]))
    dist.all_to_all_single(exact, rows.contiguous(), list(received), list(sent), group=route.group)
    rows_of_link = torch.tensor(received)
    bits = torch.tensor(route.received.bits).repeat_interleave(rows_of_link)
    is_plain = torch.tensor(route.plain).repeat_interleave(rows_of_link)
    half = exact.abs().amax(1) / (2**bits - 1).float() * 1.0002
    error = (got[0] - exact).abs().amax(1)
    assert (error <= half.masked_fill(is_plain, 0)).all()
    wires[message.wire] = wires.get(message.wire, 0) + int((error > 0).sum())
    return got


def half_a_step_off(rank, options):
    wires, original = {}, all_to_all.send
    spy = partial(checked_send, wires, original=original)
    all_to_all.send = spy
    try:
        run(compressed(make_config(), **options), rank=rank)
    finally:
        all_to_all.send = original
    return wires


@pytest.mark.parametrize(
    "options",
    [
        {"method": "dithered", "moe_a2a_bits": 3, "moe_a2a_chunks": 3},
        {"method": "birdmoe", "moe_a2a_codec": "dithered", "moe_a2a_backward_bits": 4},
        {"method": "dithered", "moe_a2a_dedup": True, "moe_a2a_chunks": 2},
        LSH | {"moe_a2a_codec": "dithered", "moe_a2a_bit_policy": "optimal"},
    ],
)
def test_values_arrive_half_a_step_off_at_most(megatron_pool, options):
    wires = megatron_pool.run(half_a_step_off, options)
    for wire in ("dispatch_fwd", "combine_fwd", "combine_bwd", "dispatch_bwd"):
        assert sum(found[wire] for found in wires) > 0


def test_rows_within_a_node_arrive_exactly(megatron_pool):
    options = {"moe_a2a_scope": "inter-node", "moe_a2a_ranks_per_node": 2}
    options |= {"method": "dithered", "moe_a2a_bits": 2}
    if len(megatron_pool.run(world_size)) == 4:
        megatron_pool.run(half_a_step_off, options)


def world_size(rank):
    return dist.get_world_size()


def evaluates(rank):
    wires, original = {}, all_to_all.send
    layer = compressed(make_config(), "dithered").eval()
    all_to_all.send = partial(checked_send, wires, original=original)
    try:
        with torch.no_grad():
            x = torch.rand(24, 2, 64, generator=torch.Generator().manual_seed(rank))
            outputs = [layer(x)[0] for _ in range(2)]
    finally:
        all_to_all.send = original
    assert not torch.equal(*outputs)  # each pass draws its own numbers
    return wires


def test_evaluation(megatron_pool):
    assert all(found["combine_fwd"] > 0 for found in megatron_pool.run(evaluates))
