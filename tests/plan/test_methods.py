import itertools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_moe_comp.comm.all_to_all import Message, send
from megatron_moe_comp.comm.routes import Route
from megatron_moe_comp.compression.random_stream import RandomStream
from megatron_moe_comp.compression.wires import WIRES
from megatron_moe_comp.options.config import CompressionConfig, codec_of
from megatron_moe_comp.plan.cost_model import CodecSpeed, Link, Machine, Prediction, predict
from megatron_moe_comp.plan.methods import (
    choose,
    method_of,
    rows_per_pair,
    safe_configs,
    stock_method,
)
from megatron_moe_comp.plan.shape import Layout, Model, Stack
from megatron_moe_comp.stats.comm_stats import CommStats

AUTO = CompressionConfig(moe_a2a_compress="auto")
ROWS = 24  # from a rank to each
HIDDEN = 64


def model_of(ranks, topk=2, experts=8, **more):
    tokens = ROWS * ranks // topk
    return Model((Stack(1, 1, tokens),), HIDDEN, 128, 128, experts, topk, 1, 1, **more)


CONFIGS = {
    "birdmoe": {"moe_a2a_compress": "birdmoe", "moe_a2a_bits": 5, "moe_a2a_bit_policy": "uniform"},
    "chunk": {
        "moe_a2a_compress": "rq",
        "moe_a2a_bits": 3,
        "moe_a2a_scale_per": "chunk",
    },
    "two codecs": {
        "moe_a2a_compress": "gaussian",
        "moe_a2a_bits": 3,
        "moe_a2a_backward_codec": "dithered",
        "moe_a2a_backward_bits": 5,
    },
    "one wire": {"moe_a2a_compress": "mxfp8", "moe_a2a_wires": ("combine_bwd", "dispatch_bwd")},
    "inter-node": {
        "moe_a2a_compress": "birdmoe",
        "moe_a2a_bit_policy": "uniform",
        "moe_a2a_scope": "inter-node",
        "moe_a2a_ranks_per_node": 1,
    },
}


def send_all_wires(rank, options, dtype):
    config, size = CompressionConfig(**options), dist.get_world_size()
    counts, plain = torch.full((size, size), ROWS), torch.eye(size, dtype=torch.bool)
    stats = CommStats()
    rows = torch.randn(ROWS * size, HIDDEN, dtype=dtype)
    probs = torch.rand(len(rows), dtype=dtype)
    for wire in WIRES:
        bits = torch.full_like(counts, config.coding(wire).bits)
        route = Route.of_rank(dist.group.WORLD, rank, counts, bits, counts, plain)
        message = Message(wire, codec_of(config, wire), RandomStream(1, 2, 3))
        send(rows, probs if wire.startswith("dispatch") else None, None, route, message, stats)
    return stats.totals()[:, 1].tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_planned_bytes_are_the_bytes_sent(pool, options, dtype):
    sent = pool.run(send_all_wires, options, getattr(torch, dtype))
    ranks = len(sent)
    layout = Layout(ranks, ranks, 1)
    model = model_of(ranks, prob_bytes=getattr(torch, dtype).itemsize, dtype=dtype)
    method = method_of("x", CompressionConfig(**options), model, layout)
    planned = [wire.mean_bytes for wire in method.traffic[0].wires]
    assert all(of_rank == planned for of_rank in sent)
    assert [wire.near_bytes + wire.far_bytes for wire in method.traffic[0].wires] == planned


def test_rows_of_a_node_stay_plain():
    model = model_of(4)
    options = CONFIGS["inter-node"] | {"moe_a2a_ranks_per_node": 2}
    layout = Layout(4, 4, 2)
    stock = stock_method(model, layout).traffic[0].wires[1]
    ours = method_of("x", CompressionConfig(**options), model, layout).traffic[0].wires[1]
    assert ours.near_bytes == stock.near_bytes == ROWS * HIDDEN * 2
    assert ours.far_bytes < stock.far_bytes / 2
    assert ours.encoded == ours.decoded == 2 * ROWS * HIDDEN


@pytest.mark.parametrize(("experts", "topk", "ranks"), [(8, 2, 4), (8, 3, 2), (6, 1, 3)])
def test_shared_rows_by_counting(experts, topk, ranks):
    chosen = list(itertools.combinations(range(experts), topk))
    rows = sum(len({expert * ranks // experts for expert in each}) for each in chosen)
    model = model_of(ranks, topk, experts)
    found = rows_per_pair(model, Layout(ranks, ranks, 1))
    assert found == pytest.approx(rows / (len(chosen) * topk))


def test_shared_rows_of_many_experts():
    # ALGORITHMS: top-8 over 8 ranks saves 8 / (8 (1 - (7 / 8)^8)) = 1.52x.
    found = rows_per_pair(model_of(8, 8, 1 << 16), Layout(8, 8, 1))
    assert 1 / found == pytest.approx(1.52, abs=0.01)


def test_auto_never_sends_few_bits_by_itself():
    balanced, skewed = Layout(8, 8, 1), Layout(8, 8, 1, load=1.5)
    for layout in (balanced, skewed):
        for policy in (None, "uniform", "optimal", "proportional"):
            for config in safe_configs(replace(AUTO, moe_a2a_bit_policy=policy), layout):
                assert config.moe_a2a_compress == "birdmoe"
                assert config.moe_a2a_bits >= 5
                uniform = config.moe_a2a_bit_policy == "uniform"
                assert uniform or config.moe_a2a_min_bits >= 5
                assert policy in (None, config.moe_a2a_bit_policy)
    (asked,) = safe_configs(replace(AUTO, moe_a2a_bits=4), skewed)
    assert (asked.moe_a2a_bits, asked.moe_a2a_bit_policy) == (4, "uniform")
    policies = [config.moe_a2a_bit_policy for config in safe_configs(AUTO, skewed)]
    assert policies.count("optimal") == 1
    assert {config.moe_a2a_bit_policy for config in safe_configs(AUTO, balanced)} == {"uniform"}


def of_step(seconds):
    return Prediction(seconds, 0, 0, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("stock", "candidates", "index"),
    [
        (1.0, [0.6, 0.59, 0.58], 1),  # the most exact within 3% of the fastest
        (1.0, [0.9, 0.7, 0.5], 2),
        (1.0, [0.99, 1.1], None),  # a gain of 1% is none
        (1.0, [0.995, 0.978], 1),  # nearly the fastest, but hardly faster than stock
        (1.0, [1.2], None),
    ],
)
def test_choice(stock, candidates, index):
    choice = choose(of_step(stock), [of_step(c) for c in candidates])
    assert choice.index == index
    chosen = min(candidates) if index is None else candidates[index]
    assert choice.speedup == pytest.approx(stock / chosen)


def test_stock_takes_a_message_more_for_its_probabilities():
    model, layout = model_of(4), Layout(4, 4, 1)
    machine = Machine(1e12, 1e12, Link(1e12), Link(1e12, 1.0), {"identity": CodecSpeed(1e12, 1e12)})
    identity = method_of("x", CompressionConfig(moe_a2a_compress="identity"), model, layout)
    stock = predict(model, layout, machine, stock_method(model, layout))
    ours = predict(model, layout, machine, identity)
    assert ours.wire_bytes == stock.wire_bytes
    assert stock.all_to_all == pytest.approx(6 * 3, rel=1e-3)
    assert ours.all_to_all == pytest.approx(4 * 3, rel=1e-3)
