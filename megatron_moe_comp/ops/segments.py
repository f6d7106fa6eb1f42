"""Segments: which rows a kernel reads or writes, and where their bytes are in a message.

An op takes its segments as one flat list of integers, `FIELDS` per segment, so that a kernel needs
no Python object: first_row, num_rows, num_bits, codes_offset, scales_offset (bytes in the message).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

FIELDS = 5
MIN_BITS, MAX_BITS = 2, 8

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


def blocks(table: Sequence[int], row_values: int, scale_bytes: int = 4) -> Iterator[OpSegment]:
    """Yields an op's segments, in pieces of about `_BLOCK_VALUES` values.

    Args:
        table: as `flatten` returns it.
        row_values: values in a row.
        scale_bytes: bytes of a row's scale.
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
                scales + start * scale_bytes,
            )


def check(
    table: Sequence[int],
    rows: torch.Tensor,
    row_scales: torch.Tensor | None,
    message: torch.Tensor,
    max_bits: int = MAX_BITS,
    scale_bytes: int = 4,
) -> None:
    """Raises ValueError unless an op's tensors have the right form and hold its segments."""
    if rows.dim() != 2 or not rows.is_contiguous() or not rows.is_floating_point():
        raise ValueError(f"rows must be contiguous [N, H] of a floating-point dtype: {rows.shape}")
    if message.dim() != 1 or not message.is_contiguous() or message.dtype != torch.uint8:
        raise ValueError(f"message must be contiguous uint8 [bytes], not {message.dtype}")
    if row_scales is not None and (
        row_scales.shape != rows.shape[:1] or row_scales.dtype != torch.float32
    ):
        raise ValueError(f"row_scales must be float32 [{len(rows)}], not {row_scales.shape}")
    if len(table) % FIELDS:
        raise ValueError(f"segments must hold {FIELDS} integers per segment, not {len(table)}")
    for i in range(0, len(table), FIELDS):
        segment = OpSegment(*table[i : i + FIELDS])
        if not MIN_BITS <= segment.num_bits <= max_bits:
            raise ValueError(f"num_bits must be {MIN_BITS} to {max_bits}: {segment}")
        if not 0 <= segment.first_row <= segment.first_row + segment.num_rows <= len(rows):
            raise ValueError(f"a segment's rows must lie in the {len(rows)} rows: {segment}")
        parts = [("codes", segment.codes_offset, -(-rows.shape[1] * segment.num_bits // 8))]
        if row_scales is None:
            parts.append(("scales", segment.scales_offset, scale_bytes))
        for name, start, row_bytes in parts if segment.num_rows else ():
            if not 0 <= start <= len(message) - segment.num_rows * row_bytes:
                raise ValueError(f"{name} must lie in the {len(message)} bytes: {segment}")
