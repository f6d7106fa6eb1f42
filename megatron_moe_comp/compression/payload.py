"""The layout of one message: everything that one rank sends in one all-to-all, as one uint8 buffer.

The rows for one rank are a segment. A segment holds its sections one after the other, each padded
with zeros to `ALIGNMENT` bytes; a rank that gets no rows gets no bytes:

    | codes of n rows | 0.. | scales of n rows | 0.. | probs of n rows | 0.. | next rank ...

Both ends derive every size from the row counts that they already share. All byte arithmetic of the
wire is in this file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

ALIGNMENT = 16
"""Bytes; a 16-byte vector load may start at any section."""


@dataclass(frozen=True)
class Section:
    """One kind of data in a segment, of a fixed size per row or per segment."""

    name: str
    row_bytes: int = 0
    segment_bytes: int = 0

    def size(self, num_rows: int) -> int:
        """Returns the bytes, without padding, in a segment of `num_rows` rows."""
        return self.row_bytes * num_rows + self.segment_bytes if num_rows else 0


@dataclass(frozen=True)
class PayloadLayout:
    """Where everything is in the buffer that carries `segment_rows[r]` rows to or from rank r."""

    sections: tuple[Section, ...]
    segment_rows: tuple[int, ...]

    def byte_splits(self) -> list[int]:
        """Returns the bytes of each rank's segment."""
        return [sum(_aligned(s.size(rows)) for s in self.sections) for rows in self.segment_rows]

    def pack(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns the buffer, uint8 [sum(byte_splits)], that holds all parts.

        Args:
            parts: one contiguous uint8 tensor per section: [N, row_bytes] with the rows in the
                order of the ranks, or [ranks, segment_bytes].
        """
        pieces = []
        first_rows = accumulate(self.segment_rows, initial=0)
        for rank, (rows, first) in enumerate(zip(self.segment_rows, first_rows, strict=False)):
            for section, part in zip(self.sections, parts, strict=True):
                size = section.size(rows)
                piece = part[first : first + rows] if section.row_bytes else part[rank : rank + 1]
                pieces.append(piece.reshape(-1)[:size])
                pieces.append(part.new_zeros(_aligned(size) - size))
        return torch.cat(pieces)

    def unpack(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """Returns the parts that `pack` was given.

        The part of a section per segment has a row of zeros for a rank without rows.

        Args:
            buffer: uint8 [sum(byte_splits)].
        """
        pieces: list[list[torch.Tensor]] = [[] for _ in self.sections]
        offset = 0
        for rows in self.segment_rows:
            for section, found in zip(self.sections, pieces, strict=True):
                size = section.size(rows)
                piece = buffer[offset : offset + size]
                if section.row_bytes:
                    found.append(piece.view(rows, section.row_bytes))
                else:
                    found.append(piece if rows else buffer.new_zeros(section.segment_bytes))
                offset += _aligned(size)
        return [
            torch.cat(found) if section.row_bytes else torch.stack(found)
            for section, found in zip(self.sections, pieces, strict=True)
        ]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def as_bytes(values: torch.Tensor) -> torch.Tensor:
    """Returns the bytes of each row of `values`, uint8 [N, bytes per row], without conversion.

    Args:
        values: [N] or [N, ...] of any dtype.
    """
    row_bytes = math.prod(values.shape[1:]) * values.dtype.itemsize
    return values.contiguous().flatten().view(torch.uint8).view(len(values), row_bytes)


def from_bytes(part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the values [N, row bytes / itemsize] whose bytes `part` [N, row bytes] holds."""
    # A slice of a message may start anywhere; a view as a wider dtype must start aligned.
    return part.clone().view(dtype)
