"""The compressed all-to-all against a plain one that sends what the codec would decode to."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megatron_moe_comp.comm import all_to_all
from megatron_moe_comp.comm.all_to_all import Message, compressed_all_to_all
from megatron_moe_comp.comm.exchange import exchange
from megatron_moe_comp.comm.routes import Route
from megatron_moe_comp.compression.codecs import CODECS as REGISTERED
from megatron_moe_comp.compression.codecs.dithered import Dithered
from megatron_moe_comp.compression.codecs.gaussian import Gaussian
from megatron_moe_comp.compression.codecs.identity import Identity
from megatron_moe_comp.compression.codecs.rq import RandomQuantization
from megatron_moe_comp.compression.packet import Packet, Peer
from megatron_moe_comp.compression.random_stream import RandomStream
from megatron_moe_comp.compression.wires import WIRES
from megatron_moe_comp.stats.comm_stats import ROWS_OF_BITS, Column, CommStats
from tests.compression.variants import usual_bits
from tests.gloo import watched_all_to_alls

HIDDEN = 64
CODECS = {
    "identity": Identity(),
    "rq-row": RandomQuantization("row"),
    "rq-chunk": RandomQuantization("chunk"),
    "dithered": Dithered(),
}
ALL_CODECS = {name: codec() for name, codec in REGISTERED.items() if name != "identity"}
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


def make_route(rank, counts, num_bits=6, ranks_per_node=1):
    """`num_bits` is the same for all links, or "mixed": 2 to 8, by sender and receiver."""
    size = dist.get_world_size()
    counts = torch.tensor(counts)[:size, :size]
    bits = torch.full_like(counts, 0 if num_bits == "mixed" else num_bits)
    if num_bits == "mixed":
        bits = 2 + (3 * torch.arange(size)[:, None] + torch.arange(size)) % 7
    nodes = torch.arange(size) // ranks_per_node
    plain = nodes[:, None] == nodes
    return Route.of_rank(dist.group.WORLD, rank, counts, bits, counts, plain)


def make_rows(rank, route, dtype):
    """Rows of magnitudes that differ by rank: 1, 8, 64, ..."""
    generator = torch.Generator().manual_seed(rank)
    num_rows = sum(route.sent.rows)
    rows = torch.randn(num_rows, HIDDEN, generator=generator) * 8.0**rank
    probs = torch.rand(num_rows, generator=generator)
    return rows.to(dtype).requires_grad_(), probs.requires_grad_()


def message(wire, codec, rank, pieces=1):
    random = RandomStream(key=rank << 32 | 77, offset=0, stream=WIRES.index(wire))
    return Message(wire, codec, random, pieces, measure_error=True)


def plain_all_to_all(values, route):
    received, sent = list(route.received.rows), list(route.sent.rows)
    out = values.new_empty((sum(received), *values.shape[1:]))
    dist.all_to_all_single(out, values.contiguous(), received, sent)
    return out


def as_decoded(values, route, codec, random):
    """Own and plain rows exact, others as their sender decodes them."""
    decoded = values.clone()
    peers = [
        Peer(rows, bits, Identity() if plain else codec, route.rank)
        for rows, bits, plain in zip(route.sent.rows, route.sent.bits, route.plain, strict=True)
    ]
    packet = Packet.plan(peers, route.rank, values)
    packet.decode(packet.encode(values, (), random), decoded, (), random)
    return decoded


def expected(values, route, codec, random):
    """What should arrive."""
    return plain_all_to_all(as_decoded(values, route, codec, random), route)


def roundtrip(rank, load, codec_name, num_bits, dtype, wires, with_probs, pieces=1, per_node=1):
    route = make_route(rank, LOADS[load], num_bits, per_node)
    codec, stats = CODECS[codec_name], CommStats()
    forward, backward = (message(wire, codec, rank, pieces) for wire in wires)
    rows, probs = make_rows(rank, route, dtype)
    got, got_probs, got_masks = compressed_all_to_all(
        rows, probs if with_probs else None, None, (route, route), (forward, backward), stats
    )
    assert got_masks is None
    want = expected(rows.detach(), route, codec, forward.random)
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
    assert torch.equal(rows.grad, expected(weights, back, codec, backward.random))
    if with_probs:
        assert torch.equal(probs.grad, plain_all_to_all(prob_weights, back))
    else:
        assert probs.grad is None

    sent = sum(route.sent.rows) - route.sent.rows[rank]
    returned = sum(route.received.rows) - route.received.rows[rank]
    totals = dict(zip(WIRES, stats.totals(), strict=True))
    for wire, count in zip(wires, (sent, returned), strict=True):
        assert totals[wire][Column.RAW] == 4 * count * (HIDDEN + with_probs)
        assert totals[wire][Column.PAIRS] == totals[wire][Column.ROWS] == count
    links = list(zip(route.sent.rows, route.sent.bits, route.plain, strict=True))
    coded = [(n, bits) for n, bits, plain in links if not plain and codec_name != "identity"]
    assert rows_of_bits(totals[wires[0]]) == rows_by_bits(coded)
    if codec_name in ("rq-row", "dithered") and dtype == torch.float32:
        squares = rows.detach().square().sum(dim=1).split(route.sent.rows)
        signal = sum(s.sum() for s, (_, _, plain) in zip(squares, links, strict=True) if not plain)
        assert totals[wires[0]][Column.SIGNAL] == pytest.approx(float(signal), rel=1e-5)
        assert (totals[wires[0]][Column.NOISE] > 0) == bool(coded and signal > 0)
        error = rows.detach() - as_decoded(rows.detach(), route, codec, forward.random)
        noise = float(error.square().sum())
        assert totals[wires[0]][Column.NOISE] == pytest.approx(noise, rel=1e-5)


def rows_of_bits(counters):
    counted = ((bits, counters[column].item()) for bits, column in ROWS_OF_BITS.items())
    return {bits: rows for bits, rows in counted if rows}


def rows_by_bits(coded):
    sums = {bits: sum(n for n, b in coded if b == bits) for _, bits in coded}
    return {bits: rows for bits, rows in sums.items() if rows}


def directions_differ(rank, load, pieces):
    """3 bits of the nearest level forward, mixed bits of dithering backward."""
    routes = make_route(rank, LOADS[load], 3), make_route(rank, LOADS[load], "mixed")
    codecs = Gaussian(), Dithered()
    messages = tuple(
        message(wire, codec, rank, pieces)
        for wire, codec in zip(WIRE_PAIRS[0], codecs, strict=True)
    )
    rows, probs = make_rows(rank, routes[0], torch.float32)
    stats = CommStats()
    got, *_ = compressed_all_to_all(rows, probs, None, routes, messages, stats)
    want = expected(rows.detach(), routes[0], codecs[0], messages[0].random)
    assert torch.equal(got, want)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(100 + rank))
    (got * weights).sum().backward()
    back = routes[1].reversed()
    assert torch.equal(rows.grad, expected(weights, back, codecs[1], messages[1].random))
    totals = dict(zip(WIRES, stats.totals(), strict=True))
    for wire, route in zip(WIRE_PAIRS[0], (routes[0], back), strict=True):
        links = zip(route.sent.rows, route.sent.bits, route.plain, strict=True)
        coded = [(n, bits) for n, bits, plain in links if not plain]
        assert rows_of_bits(totals[wire]) == rows_by_bits(coded)


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("load", ["unequal", "a rank sends nothing", "all to one"])
def test_directions_may_differ_in_codec_and_bits(pool, load, pieces):
    pool.run(directions_differ, load, pieces)


@pytest.mark.parametrize("wires", WIRE_PAIRS, ids="/".join)
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("codec_name", CODECS)
def test_forward_and_backward(pool, load, codec_name, wires):
    pool.run(roundtrip, load, codec_name, 4, torch.float32, wires, wires[0] == "dispatch_fwd")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_bits", range(2, 9))
def test_every_width_and_dtype(pool, num_bits, dtype):
    pool.run(roundtrip, "unequal", "rq-row", num_bits, dtype, WIRE_PAIRS[0], True)


@pytest.mark.parametrize("pieces", [2, 5, 64])
@pytest.mark.parametrize("codec_name", ["identity", "rq-row", "dithered"])
@pytest.mark.parametrize("load", LOADS)
def test_pieces_change_nothing(pool, load, codec_name, pieces):
    args = (load, codec_name, "mixed", torch.float32, WIRE_PAIRS[0], True, pieces)
    pool.run(roundtrip, *args)


@pytest.mark.parametrize("codec_name", CODECS)
@pytest.mark.parametrize("load", LOADS)
def test_every_link_has_its_own_bits(pool, load, codec_name):
    pool.run(roundtrip, load, codec_name, "mixed", torch.bfloat16, WIRE_PAIRS[1], False)


@pytest.mark.parametrize("codec_name", CODECS)
@pytest.mark.parametrize("load", LOADS)
def test_rows_within_a_node_travel_unchanged(pool, load, codec_name):
    pool.run(roundtrip, load, codec_name, 3, torch.float32, WIRE_PAIRS[0], True, 1, 2)


def shared_rows(rank, pieces):
    """Rows that stand for several pairs: probabilities per pair, masks per row."""
    size = dist.get_world_size()
    counts = torch.tensor(LOADS["unequal"])[:size, :size]
    pairs = (
        counts
        * torch.tensor([[1, 2, 3, 1], [2, 1, 1, 4], [3, 3, 1, 1], [1, 1, 2, 2]])[:size, :size]
    )
    bits = torch.full_like(counts, 4)
    own = torch.eye(size, dtype=torch.bool)
    route = Route.of_rank(dist.group.WORLD, rank, counts, bits, pairs, own)
    rows = torch.randn(sum(route.sent.rows), HIDDEN, requires_grad=True)
    probs = torch.rand(sum(route.sent.pairs), requires_grad=True)
    masks = torch.randint(0, 256, (len(rows), 3), dtype=torch.uint8)
    messages = tuple(message(w, CODECS["identity"], rank, pieces) for w in WIRE_PAIRS[0])
    stats = CommStats()
    got = compressed_all_to_all(rows, probs, masks, (route, route), messages, stats)
    by_pair = Route.of_rank(dist.group.WORLD, rank, pairs, bits, pairs, own)
    for values, arrived, way in zip(
        (rows, probs, masks), got, (route, by_pair, route), strict=True
    ):
        assert torch.equal(arrived, plain_all_to_all(values.detach(), way))
    weights = torch.rand(len(got[1]))
    (got[0].sum() + (got[1] * weights).sum()).backward()
    assert (rows.grad == 1).all()
    assert torch.equal(probs.grad, plain_all_to_all(weights, by_pair.reversed()))
    sent_pairs = sum(route.sent.pairs) - route.sent.pairs[rank]
    totals = dict(zip(WIRES, stats.totals(), strict=True))["dispatch_fwd"]
    assert totals[Column.RAW] == 4 * sent_pairs * (HIDDEN + 1)
    assert totals[Column.PAIRS] == sent_pairs
    assert totals[Column.ROWS] == sum(route.sent.rows) - route.sent.rows[rank]


@pytest.mark.parametrize("pieces", [1, 3])
def test_rows_of_several_pairs_and_their_masks(pool, pieces):
    pool.run(shared_rows, pieces)


def count_bytes(rank, load, codec_name, with_probs, pieces):
    stats = CommStats()
    route = make_route(rank, LOADS[load])
    rows, probs = make_rows(rank, route, torch.float32)
    messages = tuple(message(w, CODECS[codec_name], rank, pieces) for w in WIRE_PAIRS[0])
    with watched_all_to_alls(rank) as handed:
        got, *_ = compressed_all_to_all(
            rows, probs if with_probs else None, None, (route, route), messages, stats
        )
        got.sum().backward()
    totals = dict(zip(WIRES, stats.totals(), strict=True))
    return handed, [int(totals[wire][Column.WIRE]) for wire in WIRE_PAIRS[0]]


@pytest.mark.parametrize("with_probs", [True, False])
@pytest.mark.parametrize("codec_name", CODECS)
@pytest.mark.parametrize("load", LOADS)
def test_one_collective_per_wire_and_its_bytes_are_the_count(pool, load, codec_name, with_probs):
    for handed, counted in pool.run(count_bytes, load, codec_name, with_probs, 1):
        assert handed == counted


def test_pieces_are_collectives_of_their_own_and_counted(pool):
    for handed, counted in pool.run(count_bytes, "unequal", "rq-row", True, 3):
        assert len(handed) == 6
        assert [sum(handed[:3]), sum(handed[3:])] == counted


def non_finite(rank, bad):
    route = make_route(rank, LOADS["balanced"])
    rows = torch.ones(sum(route.sent.rows), HIDDEN)
    if rank == 0:
        rows[:, 5] = bad
    messages = tuple(message(w, CODECS["rq-row"], rank) for w in WIRE_PAIRS[0])
    got, *_ = compressed_all_to_all(rows, None, None, (route, route), messages, CommStats())
    assert not got[: route.received.rows[0], 5].isfinite().any()
    assert got[route.received.rows[0] :].isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_arrive_non_finite_and_harm_no_other_rank(pool, bad):
    pool.run(non_finite, bad)


def no_grad_mode(rank):
    route = make_route(rank, LOADS["unequal"])
    rows, probs = make_rows(rank, route, torch.float32)
    messages = tuple(message(w, CODECS["rq-row"], rank) for w in WIRE_PAIRS[0])
    with torch.no_grad():
        plain = compressed_all_to_all(rows, probs, None, (route, route), messages, CommStats())
    with_grad = compressed_all_to_all(rows, probs, None, (route, route), messages, CommStats())
    assert not plain[0].requires_grad
    assert with_grad[0].requires_grad
    assert with_grad[1].requires_grad
    assert all(torch.equal(a, b) for a, b in zip(plain[:2], with_grad[:2], strict=True))


def test_recording_gradients_changes_no_value(pool):
    pool.run(no_grad_mode)


def order_of_steps(rank, pieces):
    """What happens to the pieces of one forward message, in time."""
    steps = []

    class Noted(Identity):
        def encode(self, rows, segments, message, random):
            steps.append("encode")
            super().encode(rows, segments, message, random)

        def decode(self, message, segments, rows, random):
            steps.append("decode")
            super().decode(message, segments, rows, random)

    class NotedArrival:
        def __init__(self, arrival):
            self.arrival = arrival

        def wait(self):
            steps.append("wait")
            self.arrival.wait()

    def noted_exchange(*args):
        steps.append("send")
        received, arrival = exchange(*args)
        return received, NotedArrival(arrival)

    route = make_route(rank, LOADS["balanced"])
    rows, _ = make_rows(rank, route, torch.float32)
    messages = tuple(
        Message(wire, Noted(), RandomStream(0, 0, 0), pieces) for wire in WIRE_PAIRS[0]
    )
    with patch.object(all_to_all, "exchange", noted_exchange), torch.no_grad():
        compressed_all_to_all(rows, None, None, (route, route), messages, CommStats())
    return steps


def test_a_piece_is_encoded_and_another_decoded_while_one_is_under_way(pool):
    once = ["encode", "send", "wait", "decode"]
    assert pool.run(order_of_steps, 1) == [once] * len(pool.run(order_of_steps, 1))
    pipelined = ["encode", "send", *["encode", "send", "wait", "decode"] * 2, "wait", "decode"]
    assert all(steps == pipelined for steps in pool.run(order_of_steps, 3))


def unequal_magnitudes(rank, codec_name):
    """SQNR (dB) of what each rank sent here, first with equal magnitudes, then with rank 0's 8x."""
    codec = ALL_CODECS[codec_name]
    route = make_route(rank, LOADS["balanced"], num_bits=usual_bits(codec))
    generator = torch.Generator().manual_seed(rank)
    rows = torch.randn(sum(route.sent.rows), HIDDEN, generator=generator)
    results = []
    for factor in (1.0, 8.0 if rank == 0 else 1.0):
        messages = tuple(message(w, codec, rank) for w in WIRE_PAIRS[0])
        scaled = (rows * factor).requires_grad_()
        got, *_ = compressed_all_to_all(scaled, None, None, (route, route), messages, CommStats())
        want = plain_all_to_all(scaled.detach(), route)
        got.backward(want)
        exact = plain_all_to_all(want, route.reversed())
        for a, b, splits in (
            (got.detach(), want, route.received.rows),
            (scaled.grad, exact, route.sent.rows),
        ):
            signal, noise = (
                torch.stack([v.square().sum() for v in values.split(splits)])
                for values in (b, b - a)
            )
            remote = torch.arange(len(splits)) != rank
            results.append(10 * torch.log10(signal[remote] / noise[remote]))
    return results


@pytest.mark.parametrize("codec_name", ALL_CODECS)
def test_a_rank_with_8x_larger_rows_degrades_nothing(pool, codec_name):
    for equal, equal_back, larger, larger_back in pool.run(unequal_magnitudes, codec_name):
        assert torch.allclose(equal, larger, atol=0.2)
        assert torch.allclose(equal_back, larger_back, atol=0.2)


def nodes(rank):
    return all_to_all.nodes_of_ranks(dist.group.WORLD, 2)


def test_nodes_of_ranks(pool):
    results = pool.run(nodes)
    assert set(results) == {(0, 0, 1, 1)[: len(results)]}


def sum_ranks(rank):
    return all_to_all.sum_over_ranks(torch.tensor([1.0, rank], dtype=torch.float64)).tolist()


def test_sum_over_ranks(pool):
    results = pool.run(sum_ranks)
    size = len(results)
    assert results == [[size, size * (size - 1) / 2]] * size
