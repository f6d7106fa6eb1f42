"""Route: who exchanges how many rows with whom in one all-to-all, and to how many bits.

Shapes: P ranks of the group.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.distributed as dist

from megatron_moe_comp.compression.codec import Codec
from megatron_moe_comp.compression.codecs.identity import Identity
from megatron_moe_comp.ops.segments import MAX_BITS


@dataclass(frozen=True)
class Direction:
    """What one rank sends to, or receives from, each rank of its group."""

    rows: tuple[int, ...]
    bits: tuple[int, ...]
    """Bits per value of the rows of each rank."""
    pairs: tuple[int, ...]
    """(token, expert) pairs that the rows stand for: as many as rows, unless rows are shared."""
    first_rows: tuple[int, ...]
    """Index of the first of them among all rows that the other rank receives, or sends."""


@dataclass(frozen=True)
class Route:
    """Who exchanges how many rows with whom, seen from one rank of a group."""

    group: dist.ProcessGroup
    rank: int
    """This process's rank in the group."""
    sent: Direction
    received: Direction
    """Its own entries equal those of `sent`."""
    plain: tuple[bool, ...]
    """Ranks that rows are exchanged with uncompressed, whatever the codec; this one always."""

    @staticmethod
    def of_rank(
        group: dist.ProcessGroup,
        rank: int,
        rows: torch.Tensor,
        bits: torch.Tensor,
        pairs: torch.Tensor,
        plain: torch.Tensor,
    ) -> "Route":
        """Returns one rank's route.

        Args:
            group: process group.
            rank: the rank in the group.
            rows: int64 [P, P], from each rank to each other; like the rest on the CPU.
            bits: int64 [P, P], bits per value.
            pairs: int64 [P, P], see `Direction`.
            plain: bool [P, P], whether rows are exchanged uncompressed.
        """
        sent = rows, bits, pairs, rows.cumsum(dim=0) - rows
        received = rows, bits, pairs, rows.cumsum(dim=1) - rows
        return Route(
            group,
            rank,
            Direction(*(tuple(matrix[rank].tolist()) for matrix in sent)),
            Direction(*(tuple(matrix[:, rank].tolist()) for matrix in received)),
            tuple(plain[rank].tolist()),
        )

    def reversed(self) -> "Route":
        """Returns the way back."""
        return replace(self, sent=self.received, received=self.sent)


@dataclass(frozen=True)
class Links:
    """What every rank of the group sends to every other in one dispatch: [P, P], on the CPU."""

    rows: torch.Tensor
    pairs: torch.Tensor
    """(token, expert) pairs that the rows stand for."""
    bits: tuple[torch.Tensor, torch.Tensor]
    """Bits per value on the forward wires, and on the backward wires: one tensor if the same."""

    def routes(
        self, group: dist.ProcessGroup, rank: int, plain: torch.Tensor
    ) -> tuple[Route, Route]:
        """Returns the way from tokens to experts, as one rank sees it, with either bits.

        Args:
            group: process group.
            rank: the rank in the group.
            plain: see `Route.of_rank`.
        """

        def route(bits: torch.Tensor) -> Route:
            return Route.of_rank(group, rank, self.rows, bits, self.pairs, plain)

        forward_bits, backward_bits = self.bits
        forward = route(forward_bits)
        return forward, forward if backward_bits is forward_bits else route(backward_bits)

    def code_bytes(
        self, bits: torch.Tensor, codec: Codec, plain: torch.Tensor, like: torch.Tensor
    ) -> torch.Tensor:
        """Returns the bytes of the encoded rows from each rank to each other, int64 [P, P].

        Args:
            bits: int64 [P, P], bits per value.
            codec: of the rows that are not exchanged uncompressed.
            plain: see `Route.of_rank`.
            like: [any, H], for the rows' width and dtype.
        """
        coded, uncompressed = (
            _row_bytes(of, like.shape[1], like.dtype) for of in (codec, _IDENTITY)
        )
        return self.rows * torch.where(plain, uncompressed[0], coded[bits])


_IDENTITY = Identity()


@cache
def _row_bytes(codec: Codec, num_columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns the bytes of an encoded row by its bits per value, int64 [MAX_BITS + 1]."""

    def row_bytes(num_bits: int) -> int:
        return sum(s.row_bytes for s in codec.sections(num_columns, dtype, num_bits))

    return torch.tensor([row_bytes(num_bits) for num_bits in range(MAX_BITS + 1)])
