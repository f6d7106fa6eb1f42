"""The layout of a message: everything that one rank sends in one all-to-all, as one uint8 buffer.

What goes to one rank is a segment. A segment holds its sections one after the other, each padded
with zeros to `ALIGNMENT` bytes; a rank that gets nothing gets no bytes:

    | probs | 0.. | codes of n rows | 0.. | scales of n rows | 0.. | next rank ...

Both ends derive every size from the row counts that they already share. All byte arithmetic of the
wire is in this file.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


class Segment(NamedTuple):
    """Rows between this rank and one other: where they are in a tensor and in a message."""

    first_row: int
    num_rows: int
    num_bits: int
    """Bits per value; a codec of fixed width does not use it."""
    offsets: tuple[int, ...]
    """First byte of each of the codec's sections."""
    sender: int
    """Global rank that sends the rows."""
    sender_row: int
    """Index of the first row among all that the sender encodes: its number in the random stream."""


class PayloadLayout:
    """Where everything is in a message.

    Args:
        sizes: bytes of each section of each rank's segment.
    """

    def __init__(self, sizes: Iterable[Sequence[int]]) -> None:
        self.byte_splits: list[int] = []
        """The bytes of each rank's segment, padding included."""
        self.offsets: list[list[int]] = []
        """The first byte of each section of each rank's segment."""
        end = 0
        for sections in sizes:
            start, offsets = end, []
            for size in sections:
                offsets.append(end)
                end += _aligned(size)
            self.byte_splits.append(end - start)
            self.offsets.append(offsets)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def write_bytes(message: torch.Tensor, offset: int, values: torch.Tensor) -> None:
    """Copies the bytes of `values`, of any dtype, to message[offset:]."""
    octets = as_bytes(values)
    message[offset : offset + octets.numel()] = octets.flatten()


def read_bytes(
    message: torch.Tensor, offset: int, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """Returns the values of this shape and dtype whose bytes are at message[offset:], copied."""
    octets = message[offset : offset + math.prod(shape) * dtype.itemsize]
    # A slice of a message may start anywhere; a view as a wider dtype must start aligned.
    return octets.clone().view(dtype).view(*shape)


def as_bytes(values: torch.Tensor) -> torch.Tensor:
    """Returns the bytes of each row of `values`, uint8 [N, bytes per row], without conversion.

    Args:
        values: [N] or [N, ...] of any dtype.
    """
    row_bytes = math.prod(values.shape[1:]) * values.dtype.itemsize
    return values.contiguous().flatten().view(torch.uint8).view(len(values), row_bytes)
