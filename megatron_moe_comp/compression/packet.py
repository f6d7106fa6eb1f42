"""A packet: one message of an all-to-all, or one of the pieces that it is sent in.

Sender and receiver plan the same packet from the counts they share, each from its own side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_moe_comp.compression.codec import Codec
from megatron_moe_comp.compression.payload import (
    PayloadLayout,
    Section,
    Segment,
    as_bytes,
)
from megatron_moe_comp.compression.random_stream import RandomStream


class Peer(NamedTuple):
    """What travels between this rank and one other in one direction, and how it is encoded."""

    num_rows: int
    num_bits: int
    codec: Codec
    sender: int = 0
    """Global rank of the one of both that sends."""
    sender_row: int | None = None
    """Index of the first row among all that the sender sends; None: this rank sends."""


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
    segments: tuple[tuple[Codec, Sequence[Segment]], ...]
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
        exact_splits = [[n * e.item_bytes for n in e.splits] for e in exact]
        # Hundreds of ranks share a few widths.
        sections: dict[tuple[Codec, int], tuple[Section, ...]] = {}
        sizes, ranges, first_row = [], [], 0
        for rank, (num_rows, num_bits, codec, *_) in enumerate(peers):
            start, stop = num_rows * piece // num_pieces, num_rows * (piece + 1) // num_pieces
            count = 0 if rank == own else stop - start
            ranges.append((first_row + start, count))
            first_row += num_rows
            if (codec, num_bits) not in sections:
                found = codec.sections(like.shape[1], like.dtype, num_bits)
                sections[codec, num_bits] = found
            sizes.append(
                [splits[rank] for splits in exact_splits]
                + [section.size(count) for section in sections[codec, num_bits]]
            )
        layout = PayloadLayout(sizes)
        by_codec: dict[Codec, list[Segment]] = {}
        for peer, (start, count), offsets in zip(peers, ranges, layout.offsets, strict=True):
            if count:
                sender_row = start
                if peer.sender_row is not None:
                    sender_row = peer.sender_row + peer.num_rows * piece // num_pieces
                segment = Segment(
                    start,
                    count,
                    peer.num_bits,
                    tuple(offsets[len(exact) :]),
                    peer.sender,
                    sender_row,
                )
                by_codec.setdefault(peer.codec, []).append(segment)
        return Packet(
            layout,
            tuple(by_codec.items()),
            tuple(
                tuple(
                    (offsets[i], size) for offsets, size in zip(layout.offsets, sizes, strict=True)
                )
                for i, sizes in enumerate(exact_splits)
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
            # One launch on a GPU, however many ranks there are.
            torch._foreach_copy_(_slices(message, places), _in_turn(as_bytes(values), places))
        return message

    def decode(
        self,
        message: torch.Tensor,
        rows: torch.Tensor,
        exact: Sequence[torch.Tensor],
        random: RandomStream,
    ) -> None:
        """Writes what the packet holds.

        Args:
            message: uint8 [sum(byte_splits)].
            rows: [M, H], to write to.
            exact: contiguous tensors to write to, one per Exact.
            random: of the message, of any rank.
        """
        for codec, segments in self.segments:
            codec.decode(message, segments, rows, random)
        for values, places in zip(exact, self.exact, strict=True):
            torch._foreach_copy_(
                _in_turn(values.view(torch.uint8), places), _slices(message, places)
            )


def _slices(message: torch.Tensor, places: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    return [message[offset : offset + size] for offset, size in places]


def _in_turn(octets: torch.Tensor, places: Sequence[tuple[int, int]]) -> Sequence[torch.Tensor]:
    return octets.flatten().split([size for _, size in places])
