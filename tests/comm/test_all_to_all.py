"""The compressed all-to-all against a plain one that sends what the codec would decode to."""

import pytest
import torch
import torch.distributed as dist

from megatron_moe_comp.comm import all_to_all
from megatron_moe_comp.comm.all_to_all import Message, Route, compressed_all_to_all
from megatron_moe_comp.comm_stats import NOISE, RAW, SIGNAL, WIRE, CommStats
from megatron_moe_comp.compression.codec import RowFormat
from megatron_moe_comp.compression.codecs.identity import Identity
from megatron_moe_comp.compression.codecs.rq import RandomQuantization
from megatron_moe_comp.compression.random_stream import RandomStream
from megatron_moe_comp.config import WIRES

HIDDEN = 64
CODECS = {
    "identity": Identity(),
    "rq-row": RandomQuantization("row"),
    "rq-chunk": RandomQuantization("chunk"),
}
# Rows from rank s to rank d, as counts[s][d], of the first ranks that there are.
LOADS = {
    "balanced": [[4] * 4] * 4,
    "unequal": [[3, 17, 0, 5], [9, 2, 8, 1], [0, 1, 6, 30], [7, 0, 2, 4]],
    "a rank sends nothing": [[0, 0, 0, 0], [5, 3, 1, 2], [2, 2, 2, 2], [1, 9, 0, 4]],
    "all to one": [[6, 0, 0, 0], [11, 0, 0, 0], [3, 0, 0, 0], [8, 0, 0, 0]],
    "nothing crosses": [[5, 0, 0, 0], [0, 7, 0, 0], [0, 0, 1, 0], [0, 0, 0, 2]],
    "nothing at all": [[0] * 4] * 4,
}
WIRE_PAIRS = [("dispatch_fwd", "dispatch_bwd"), ("combine_fwd", "combine_bwd")]


def make_route(rank, counts):
    size = dist.get_world_size()
    return Route(
        dist.group.WORLD,
        rank,
        tuple(counts[rank][:size]),
        tuple(row[rank] for row in counts[:size]),
    )


def make_rows(rank, route, dtype):
    """Rows of magnitudes that differ by rank: 1, 8, 64, ..."""
    generator = torch.Generator().manual_seed(rank)
    num_rows = sum(route.input_splits)
    rows = torch.randn(num_rows, HIDDEN, generator=generator) * 8.0**rank
    probs = torch.rand(num_rows, generator=generator)
    return rows.to(dtype).requires_grad_(), probs.requires_grad_()


def message(wire, codec, rank, num_bits):
    random = RandomStream(key=rank, offset=0, stream=WIRES.index(wire))
    return Message(wire, codec, num_bits, random, measure_error=True)


def plain_all_to_all(values, route):
    out = values.new_empty((sum(route.output_splits), *values.shape[1:]))
    dist.all_to_all_single(out, values, list(route.output_splits), list(route.input_splits))
    return out


def expected(values, route, codec, num_bits, random):
    """What should arrive: own rows exact, others decoded by their sender, sent uncompressed."""
    first = sum(route.input_splits[: route.rank])
    own = slice(first, first + route.input_splits[route.rank])
    remote = torch.cat((values[: own.start], values[own.stop :]))
    splits = list(route.input_splits)
    splits[route.rank] = 0
    row_format = RowFormat(HIDDEN, values.dtype, num_bits)
    decoded = codec.decode(codec.encode(remote, splits, row_format, random), splits, row_format)
    return plain_all_to_all(
        torch.cat((decoded[: own.start], values[own], decoded[own.start :])), route
    )


def roundtrip(rank, load, codec_name, num_bits, dtype, wires, with_probs):
    route, codec, stats = make_route(rank, LOADS[load]), CODECS[codec_name], CommStats()
    forward, backward = (message(wire, codec, rank, num_bits) for wire in wires)
    rows, probs = make_rows(rank, route, dtype)
    got, got_probs = compressed_all_to_all(
        rows, probs if with_probs else None, route, (forward, backward), stats
    )
    want = expected(rows.detach(), route, codec, num_bits, forward.random)
    assert got.dtype == dtype
    assert torch.equal(got, want), (got - want).abs().max()

    # The gradient of a linear function of the output is its weights, through the way back.
    generator = torch.Generator().manual_seed(100 + rank)
    weights = (torch.randn(got.shape, generator=generator) * 4.0**-rank).to(dtype)
    loss = (got * weights).sum()
    if with_probs:
        assert torch.equal(got_probs, plain_all_to_all(probs.detach(), route))
        prob_weights = torch.randn(got_probs.shape, generator=generator)
        loss = loss.float() + (got_probs * prob_weights).sum()
    loss.backward()
    back = route.reversed()
    assert torch.equal(rows.grad, expected(weights, back, codec, num_bits, backward.random))
    if with_probs:
        assert torch.equal(probs.grad, plain_all_to_all(prob_weights, back))
    else:
        assert probs.grad is None

    sent = sum(route.input_splits) - route.input_splits[rank]
    returned = sum(route.output_splits) - route.output_splits[rank]
    totals = dict(zip(WIRES, stats.totals(), strict=True))
    assert totals[wires[0]][RAW] == 4 * sent * (HIDDEN + with_probs)
    assert totals[wires[1]][RAW] == 4 * returned * (HIDDEN + with_probs)
    if sent and codec_name == "rq-row" and dtype == torch.float32:
        own = slice(sum(route.input_splits[:rank]), sum(route.input_splits[: rank + 1]))
        signal = rows.detach().square().sum() - rows.detach()[own].square().sum()
        assert totals[wires[0]][SIGNAL] == pytest.approx(signal.item(), rel=1e-5)
        assert totals[wires[0]][NOISE] > 0


@pytest.mark.parametrize("wires", WIRE_PAIRS, ids="/".join)
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("codec_name", CODECS)
def test_forward_and_backward(pool, load, codec_name, wires):
    pool.run(roundtrip, load, codec_name, 4, torch.float32, wires, wires[0] == "dispatch_fwd")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_bits", range(2, 9))
def test_every_width_and_dtype(pool, num_bits, dtype):
    pool.run(roundtrip, "unequal", "rq-row", num_bits, dtype, WIRE_PAIRS[0], True)


def count_bytes(rank, load, codec_name, with_probs):
    handed = []
    original = dist.all_to_all_single

    def spy(output, buffer, output_splits, input_splits, group):
        assert buffer.dtype == output.dtype == torch.uint8
        assert buffer.numel() == sum(input_splits)
        assert output.numel() == sum(output_splits)
        assert input_splits[rank] == output_splits[rank] == 0
        handed.append(buffer.numel())
        return original(output, buffer, output_splits, input_splits, group=group)

    stats = CommStats()
    route = make_route(rank, LOADS[load])
    rows, probs = make_rows(rank, route, torch.float32)
    messages = tuple(message(w, CODECS[codec_name], rank, 6) for w in WIRE_PAIRS[0])
    dist.all_to_all_single = spy
    try:
        got, _ = compressed_all_to_all(rows, probs if with_probs else None, route, messages, stats)
        got.sum().backward()
    finally:
        dist.all_to_all_single = original
    totals = dict(zip(WIRES, stats.totals(), strict=True))
    return handed, [int(totals[wire][WIRE]) for wire in WIRE_PAIRS[0]]


@pytest.mark.parametrize("with_probs", [True, False])
@pytest.mark.parametrize("codec_name", CODECS)
@pytest.mark.parametrize("load", LOADS)
def test_one_collective_per_wire_and_its_bytes_are_the_count(pool, load, codec_name, with_probs):
    for handed, counted in pool.run(count_bytes, load, codec_name, with_probs):
        assert handed == counted


def non_finite(rank, bad):
    route = make_route(rank, LOADS["balanced"])
    rows = torch.ones(sum(route.input_splits), HIDDEN)
    if rank == 0:
        rows[:, 5] = bad
    messages = tuple(message(w, CODECS["rq-row"], rank, 6) for w in WIRE_PAIRS[0])
    got, _ = compressed_all_to_all(rows, None, route, messages, CommStats())
    assert not got[: route.output_splits[0], 5].isfinite().any()
    assert got[route.output_splits[0] :].isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_arrive_non_finite_and_harm_no_other_rank(pool, bad):
    pool.run(non_finite, bad)


def no_grad_mode(rank):
    route = make_route(rank, LOADS["unequal"])
    rows, probs = make_rows(rank, route, torch.float32)
    messages = tuple(message(w, CODECS["rq-row"], rank, 6) for w in WIRE_PAIRS[0])
    with torch.no_grad():
        plain = compressed_all_to_all(rows, probs, route, messages, CommStats())
    with_grad = compressed_all_to_all(rows, probs, route, messages, CommStats())
    assert not plain[0].requires_grad
    assert with_grad[0].requires_grad
    assert with_grad[1].requires_grad
    assert all(torch.equal(a, b) for a, b in zip(plain, with_grad, strict=True))


def test_recording_gradients_changes_no_value(pool):
    pool.run(no_grad_mode)


def sum_ranks(rank):
    return all_to_all.sum_over_ranks(torch.tensor([1.0, rank], dtype=torch.float64)).tolist()


def test_sum_over_ranks(pool):
    results = pool.run(sum_ranks)
    size = len(results)
    assert results == [[size, size * (size - 1) / 2]] * size
