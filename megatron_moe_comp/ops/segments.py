"""Segments: which rows a kernel reads or writes, and where their bytes are in a message.

An op takes its segments as one flat list of integers, `FIELDS` per segment, so that a kernel needs
no Python object: first_row, num_rows, num_bits, codes_offset, scales_offset (bytes in the message).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

FIELDS = 5

_BLOCK_VALUES = 1 << 18
"""Values that the references work on at once, so that their int64 temporaries stay in the cache."""


class OpSegment(NamedTuple):
    """Rows of one width whose codes lie one after the other in a message."""

    first_row: int
    num_rows: int
    num_bits: int
    codes_offset: int
    scales_offset: int


def flatten(segments: Sequence[OpSegment]) -> list[int]:
    """Returns the segments as an op takes them."""
    return [value for segment in segments for value in segment]


def blocks(table: Sequence[int], row_values: int) -> Iterator[OpSegment]:
    """Yields an op's segments, in pieces of about `_BLOCK_VALUES` values.

    Args:
        table: as `flatten` returns it.
        row_values: values in a row.
    """
    rows = max(1, _BLOCK_VALUES // max(1, row_values))
    for i in range(0, len(table), FIELDS):
        first, num_rows, num_bits, codes, scales = table[i : i + FIELDS]
        row_bytes = -(-row_values * num_bits // 8)
        for start in range(0, num_rows, rows):
            yield OpSegment(
                first + start,
                min(rows, num_rows - start),
                num_bits,
                codes + start * row_bytes,
                scales + start * 4,
            )
