"""Packets of several ranks, planned from both ends."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_comp.compression.packet import Exact, Packet, Peer
from megatron_moe_comp.compression.payload import ALIGNMENT
from megatron_moe_comp.compression.random_stream import RandomStream
from tests.compression.variants import RANDOM, VARIANTS, all_bits, normal_rows

HIDDEN = 24
ITEM_BYTES = (4, 3)


@dataclass
class Exchange:
    """One all-to-all of some ranks, as every rank sees it: peers[s][d], and exact items."""

    peers: list[list[Peer]]
    items: list[list[tuple[int, int]]]
    num_pieces: int
    dtype: torch.dtype

    @property
    def size(self):
        return len(self.peers)

    def sent(self, rank):
        return [peer._replace(sender=rank) for peer in self.peers[rank]]

    def received(self, rank):
        """With the sender, and where among its rows those for this rank begin."""
        return [
            row[rank]._replace(sender=s, sender_row=sum(peer.num_rows for peer in row[:rank]))
            for s, row in enumerate(self.peers)
        ]

    def exact(self, items, piece):
        """Exact values travel with the first piece."""
        if piece:
            return []
        return [Exact(tuple(i[e] for i in items), size) for e, size in enumerate(ITEM_BYTES)]

    def sent_items(self, rank):
        return self.items[rank]

    def received_items(self, rank):
        return [row[rank] for row in self.items]

    def sender_plan(self, rank, piece):
        like = torch.empty(0, HIDDEN, dtype=self.dtype)
        exact = self.exact(self.sent_items(rank), piece)
        return Packet.plan(self.sent(rank), rank, like, exact, piece, self.num_pieces)

    def receiver_plan(self, rank, piece):
        like = torch.empty(0, HIDDEN, dtype=self.dtype)
        exact = self.exact(self.received_items(rank), piece)
        return Packet.plan(self.received(rank), rank, like, exact, piece, self.num_pieces)


@st.composite
def exchanges(draw, max_pieces=3):
    size = draw(st.integers(1, 4))
    num_pieces = draw(st.integers(1, max_pieces))
    names = [n for n, c in VARIANTS.items() if num_pieces == 1 or not c.is_segment_wide]
    codecs = [VARIANTS[draw(st.sampled_from(names))], VARIANTS["identity"]]

    def peer():
        codec = draw(st.sampled_from(codecs))
        return Peer(draw(st.integers(0, 7)), draw(st.sampled_from(all_bits(codec))), codec)

    def items(s, d):
        # A rank's own values travel in no packet.
        return (0, 0) if s == d else (draw(st.integers(0, 5)), draw(st.integers(0, 5)))

    return Exchange(
        [[peer() for _ in range(size)] for _ in range(size)],
        [[items(s, d) for d in range(size)] for s in range(size)],
        num_pieces,
        draw(st.sampled_from([torch.float32, torch.bfloat16])),
    )


def places(packet, num_exact, dtype):
    """Every section of a packet: first byte and size."""
    found = [place for exact in packet.exact for place in exact]
    assert len(packet.exact) == num_exact
    for codec, segments in packet.segments:
        for segment in segments:
            sections = codec.sections(HIDDEN, dtype, segment.num_bits)
            sizes = [section.size(segment.num_rows) for section in sections]
            found += zip(segment.offsets, sizes, strict=True)
    return [(offset, size) for offset, size in found if size]


@given(exchanges())
@settings(max_examples=100, deadline=None)
def test_sections_are_aligned_apart_and_inside(exchange):
    for piece in range(exchange.num_pieces):
        packet = exchange.sender_plan(0, piece)
        found = sorted(places(packet, 0 if piece else 2, exchange.dtype))
        assert all(offset % ALIGNMENT == 0 for offset, _ in found)
        assert all(a + size <= b for (a, size), (b, _) in pairwise(found))
        total = sum(packet.layout.byte_splits)
        assert total - sum(size for _, size in found) < ALIGNMENT * max(1, len(found))
        assert all(offset + size <= total for offset, size in found)
        assert packet.layout.byte_splits[0] == 0  # nothing for this rank itself


@given(exchanges())
@settings(max_examples=100, deadline=None)
def test_padding_is_zero(exchange):
    packet = exchange.sender_plan(0, 0)
    items = exchange.sent_items(0)
    rows = normal_rows(exchange.dtype, HIDDEN, sum(peer.num_rows for peer in exchange.sent(0)))
    exact = [
        torch.full((sum(i[e] for i in items), size), 0xFF, dtype=torch.uint8)
        for e, size in enumerate(ITEM_BYTES)
    ]
    message = packet.encode(rows, exact, RANDOM)
    is_padding = torch.ones(len(message), dtype=torch.bool)
    for offset, size in places(packet, 2, exchange.dtype):
        is_padding[offset : offset + size] = False
    assert not message[is_padding].any()


@given(exchanges(), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_what_arrives_is_what_every_rank_sent(exchange, seed):
    """Through a simulated all-to-all, against each sender's own decoding of its message."""
    generator = torch.Generator().manual_seed(seed)
    ranks, pieces = range(exchange.size), range(exchange.num_pieces)

    def make_rows(rank):
        num_rows = sum(peer.num_rows for peer in exchange.sent(rank))
        return torch.randn(num_rows, HIDDEN, generator=generator).to(exchange.dtype)

    def make_exact(items):
        shapes = [(sum(i[e] for i in items), size) for e, size in enumerate(ITEM_BYTES)]
        return [torch.randint(0, 256, s, generator=generator).to(torch.uint8) for s in shapes]

    def make_arrived(rank):
        num_rows = sum(peer.num_rows for peer in exchange.received(rank))
        return torch.full((num_rows, HIDDEN), math.nan, dtype=exchange.dtype)

    rows = [make_rows(r) for r in ranks]
    exact = [make_exact(exchange.sent_items(r)) for r in ranks]
    seen = [torch.full_like(r, math.nan) for r in rows]
    arrived = [make_arrived(r) for r in ranks]
    exact_arrived = [make_exact(exchange.received_items(r)) for r in ranks]
    for piece in pieces:
        segments = []
        for r in ranks:
            packet = exchange.sender_plan(r, piece)
            random = RANDOM.of_rank(r)
            message = packet.encode(rows[r], [] if piece else exact[r], random)
            for codec, own in packet.segments:
                codec.decode(message, own, seen[r], random)
            segments.append(message.split(packet.layout.byte_splits))
        for r in ranks:
            packet = exchange.receiver_plan(r, piece)
            assert packet.layout.byte_splits == [len(segments[s][r]) for s in ranks]
            message = torch.cat([segments[s][r] for s in ranks])
            packet.decode(message, arrived[r], [] if piece else exact_arrived[r], RANDOM)
    for d in ranks:
        for e in range(len(ITEM_BYTES)):
            expected = [exact[s][e].split([i[e] for i in exchange.sent_items(s)])[d] for s in ranks]
            assert torch.equal(exact_arrived[d][e], torch.cat(expected))
        found = arrived[d].split([p.num_rows for p in exchange.received(d)])
        for s in ranks:
            sent = seen[s].split([p.num_rows for p in exchange.sent(s)])[d]
            assert found[s].isnan().all() == sent.isnan().all()
            if s == d:
                assert found[s].isnan().all()  # its own rows are in no packet
            else:
                assert torch.equal(found[s], sent)


@given(counts=st.lists(st.integers(0, 20), min_size=1, max_size=4), num_pieces=st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_pieces_are_nearly_equal_and_cover_every_row_once(counts, num_pieces):
    codec = VARIANTS["identity"]
    ranks = torch.repeat_interleave(torch.tensor(counts))
    covered = torch.zeros(sum(counts), dtype=torch.int)
    for piece in range(num_pieces):
        peers = [Peer(count, 8, codec) for count in counts]
        packet = Packet.plan(peers, -1, torch.empty(0, 8), (), piece, num_pieces)
        for _, segments in packet.segments:
            for segment in segments:
                own = slice(segment.first_row, segment.first_row + segment.num_rows)
                covered[own] += 1
                (rank,) = ranks[own].unique()
                assert segment.num_rows - counts[rank] // num_pieces in (0, 1)
    assert (covered == 1).all()


def test_ranks_with_one_codec_are_encoded_together():
    identity, int8 = VARIANTS["identity"], VARIANTS["int8"]
    peers = [Peer(2, 8, int8), Peer(3, 8, identity), Peer(4, 8, replace(int8)), Peer(0, 8, int8)]
    packet = Packet.plan(peers, 1, torch.empty(0, HIDDEN))
    ((codec, segments),) = packet.segments
    assert codec == int8
    assert [(s.first_row, s.num_rows) for s in segments] == [(0, 2), (5, 4)]


def test_exact_values_of_any_dtype_and_none_for_a_rank_without_rows():
    peers = [Peer(0, 8, VARIANTS["identity"]), Peer(2, 8, VARIANTS["rq-row"])]
    packet = Packet.plan(peers, -1, torch.empty(0, HIDDEN), [Exact((0, 3), 8)])
    values = torch.tensor([1.5, math.pi, -0.0], dtype=torch.float64)
    message = packet.encode(normal_rows(hidden=HIDDEN, num_rows=2), [values], RandomStream(1, 2, 3))
    assert packet.layout.byte_splits[0] == 0
    found = torch.full_like(values, math.nan)
    packet.decode(message, torch.empty(2, HIDDEN), [found], RANDOM)
    assert torch.equal(found, values)
