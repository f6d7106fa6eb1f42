"""A packet: one message of an all-to-all, or one of the pieces that it is sent in.

Sender and receiver plan the same packet from the counts they share, each from its own side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from megatron_moe_comp.compression.codec import Codec
from megatron_moe_comp.compression.payload import (
    PayloadLayout,
    Segment,
    as_bytes,
    write_bytes,
)
from megatron_moe_comp.compression.random_stream import RandomStream


@dataclass(frozen=True)
class Peer:
    """What travels between this rank and one other in one direction, and how it is encoded."""

    num_rows: int
    num_bits: int
    codec: Codec


@dataclass(frozen=True)
class Exact:
    """Values beside the rows that are sent bit for bit: probabilities, routing masks."""

    splits: tuple[int, ...]
    """Items for each rank."""
    item_bytes: int


@dataclass(frozen=True)
class Packet:
    """The layout of a packet, and which segments each codec has in it."""

    layout: PayloadLayout
    segments: tuple[tuple[Codec, tuple[Segment, ...]], ...]
    exact: tuple[tuple[tuple[int, int], ...], ...]
    """For each Exact: first byte and bytes for each rank."""

    @staticmethod
    def plan(
        peers: Sequence[Peer],
        own: int,
        like: torch.Tensor,
        exact: Sequence[Exact] = (),
        piece: int = 0,
        num_pieces: int = 1,
    ) -> "Packet":
        """Returns the plan of one piece of the rows of all peers.

        Args:
            peers: of every rank in order; rows lie in their order.
            own: this rank, whose rows are in no packet.
            like: a tensor with the rows' hidden size and dtype.
            exact: what travels beside the rows in this piece.
            piece: which piece, from 0.
            num_pieces: pieces that each peer's rows are cut into, as equal as can be.
        """
        first_rows = accumulate((peer.num_rows for peer in peers), initial=0)
        sizes, ranges = [], []
        for rank, (peer, first) in enumerate(zip(peers, first_rows, strict=False)):
            start, stop = (peer.num_rows * i // num_pieces for i in (piece, piece + 1))
            num_rows = 0 if rank == own else stop - start
            ranges.append((first + start, num_rows))
            sections = peer.codec.sections(like.shape[1], like.dtype, peer.num_bits)
            exact_sizes = tuple(e.splits[rank] * e.item_bytes for e in exact)
            sizes.append((*exact_sizes, *(section.size(num_rows) for section in sections)))
        layout = PayloadLayout(tuple(sizes))
        by_codec: dict[Codec, list[Segment]] = {}
        for peer, (first_row, num_rows), offsets in zip(peers, ranges, layout.offsets, strict=True):
            if num_rows:
                segment = Segment(first_row, num_rows, peer.num_bits, offsets[len(exact) :])
                by_codec.setdefault(peer.codec, []).append(segment)
        return Packet(
            layout,
            tuple((codec, tuple(segments)) for codec, segments in by_codec.items()),
            tuple(
                tuple(
                    (offsets[i], size[i])
                    for offsets, size in zip(layout.offsets, sizes, strict=True)
                )
                for i in range(len(exact))
            ),
        )

    def encode(
        self, rows: torch.Tensor, exact: Sequence[torch.Tensor], random: RandomStream
    ) -> torch.Tensor:
        """Returns the packet's bytes, uint8 [sum(byte_splits)].

        Args:
            rows: [N, H] of all ranks, in their order, contiguous.
            exact: the values of each Exact, for each rank in order.
            random: of the message.
        """
        message = torch.zeros(sum(self.layout.byte_splits), dtype=torch.uint8, device=rows.device)
        for codec, segments in self.segments:
            codec.encode(rows, segments, message, random)
        for values, places in zip(exact, self.exact, strict=True):
            octets, first = as_bytes(values).flatten(), 0
            for offset, size in places:
                write_bytes(message, offset, octets[first : first + size])
                first += size
        return message

    def decode(
        self, message: torch.Tensor, rows: torch.Tensor, exact: Sequence[torch.Tensor]
    ) -> None:
        """Writes what the packet holds into `rows` [M, H] and the contiguous tensors of `exact`."""
        for codec, segments in self.segments:
            codec.decode(message, segments, rows)
        for values, places in zip(exact, self.exact, strict=True):
            octets, first = values.flatten().view(torch.uint8), 0
            for offset, size in places:
                octets[first : first + size] = message[offset : offset + size]
                first += size
