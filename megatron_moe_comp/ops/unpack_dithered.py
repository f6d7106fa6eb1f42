"""unpack_dithered: mid-rise codes back to float rows, less the random part of their rounding.

Shapes: N rows, H columns, b bits, B = ceil(H * b / 8) bytes per row.
"""

from collections.abc import Sequence
from itertools import batched

import torch

from megatron_moe_comp.ops.philox import random_halves
from megatron_moe_comp.ops.quantize_pack import SMALLEST_SCALE, levels, packed_bytes, top_level
from megatron_moe_comp.ops.segments import FIELDS, blocks, check
from megatron_moe_comp.ops.unpack_dequantize import unpack

SCHEMA = (
    "(Tensor message, Tensor(a!) rows, int[] segments, int[] senders, int offset, int stream) -> ()"
)


def dequantize_dithered(
    codes: torch.Tensor,
    scales: torch.Tensor,
    num_bits: int,
    first_row: int,
    *,
    key: int,
    offset: int,
    stream: int,
) -> torch.Tensor:
    """Returns values whose error is uniform within half a step, whatever they were; float32 [N, H].

    `quantize` rounds x / s * t + t, with the top level t = L + 1/2, to a multiple f of 1 / 65536,
    adds sixteen random bits r and keeps the whole part q of the sum: f is q - r and a fraction
    below 1, that is uniform since r is. Half a step in place of the fraction gives subtractive
    dithering: unbiased, of variance (s / t)^2 / 12. Half a step less t is -L.
    For example, with s = 1, 3 bits (L = 3, t = 3.5) and code 5:

        r = 0      ->  2.0 / 3.5 = 0.571
        r = 32768  ->  1.5 / 3.5 = 0.429
        r = 65535  ->  1.0 / 3.5 = 0.286

    Args:
        codes: uint8 [N, H], as `quantize` returns them with mid-rise levels.
        scales: float32 [N]; NaN gives a row of NaN, below `SMALLEST_SCALE` one of zeros.
        num_bits: 2 to 8.
        first_row: number of the first row in the random stream.
        key: with offset and stream, which random numbers were used; see `quantize_pack`.
        offset: see key.
        stream: see key.
    """
    num_rows, hidden = codes.shape
    rows = torch.arange(first_row, first_row + num_rows, device=codes.device)
    halves = random_halves(rows, -(-hidden // 8), key=key, offset=offset, stream=stream)
    # At most 24 bits, which a float32 holds.
    fixed_point = (codes.to(torch.int32) - levels(num_bits) << 16) - halves.flatten(1)[:, :hidden]
    top = torch.full_like(scales, top_level(num_bits, mid_rise=True) * 2.0**16)
    unit = torch.where(scales < SMALLEST_SCALE, 0.0, scales) / top
    return fixed_point.float() * unit[:, None]


def _reference(
    message: torch.Tensor,
    rows: torch.Tensor,
    segments: Sequence[int],
    senders: Sequence[int],
    offset: int,
    stream: int,
) -> None:
    check(segments, rows, None, message)
    check_senders(segments, senders)
    if not (0 <= offset < 2**32 and 0 <= stream < 2**32):
        raise ValueError(f"offset and stream must be 0 to 2^32 - 1, not {offset} and {stream}")
    hidden, largest = rows.shape[1], min(torch.finfo(d).max for d in (rows.dtype, torch.float32))
    for table, (sender_row, key) in zip(
        batched(segments, FIELDS), batched(senders, 2), strict=True
    ):
        for first, num_rows, num_bits, codes_offset, scales_offset in blocks(table, hidden):
            octets = message[scales_offset : scales_offset + 4 * num_rows]
            row_bytes = packed_bytes(hidden, num_bits)
            packed = message[codes_offset : codes_offset + num_rows * row_bytes]
            values = dequantize_dithered(
                unpack(packed.view(num_rows, row_bytes), num_bits, hidden),
                # A slice of a message may start anywhere; a view must start aligned.
                octets.clone().view(torch.float32),
                num_bits,
                sender_row + first - table[0],
                key=key,
                offset=offset,
                stream=stream,
            )
            rows[first : first + num_rows] = values.clamp(-largest, largest).to(rows.dtype)


def check_senders(segments: Sequence[int], senders: Sequence[int]) -> None:
    """Raises ValueError unless there are a row below 2^32 and a key for each segment."""
    if len(senders) // 2 * FIELDS != len(segments) or len(senders) % 2:
        raise ValueError(f"senders must hold 2 integers per segment, not {len(senders)} in all")
    for table, (sender_row, _) in zip(batched(segments, FIELDS), batched(senders, 2), strict=True):
        if not 0 <= sender_row <= 2**32 - table[1]:
            raise ValueError(f"a sender's rows must be 0 to 2^32 - 1: {table[1]} from {sender_row}")


def _fake(
    message: torch.Tensor,
    rows: torch.Tensor,
    segments: Sequence[int],
    senders: Sequence[int],
    offset: int,
    stream: int,
) -> None:
    return None


torch.library.define("megatron_moe_comp::unpack_dithered", SCHEMA)
torch.library.impl("megatron_moe_comp::unpack_dithered", "CompositeExplicitAutograd")(_reference)
torch.library.register_fake("megatron_moe_comp::unpack_dithered")(_fake)


def unpack_dithered(
    message: torch.Tensor,
    rows: torch.Tensor,
    segments: Sequence[int],
    senders: Sequence[int],
    *,
    offset: int,
    stream: int,
) -> None:
    """Writes the rows of a message's segments; see `dequantize_dithered`.

    Values beyond the range of the rows' dtype become its largest.

    Args:
        message: uint8 [bytes], as `quantize_pack` left it, with mid-rise levels and scales of
            its own.
        rows: [N, H], contiguous, of any floating-point dtype; only the rows of the segments are
            written.
        segments: see `segments`; first_row is where the rows go.
        senders: two integers per segment: the index that its first row had among the rows of
            `quantize_pack`, and the key.
        offset: that of `quantize_pack`.
        stream: that of `quantize_pack`.
    """
    torch.ops.megatron_moe_comp.unpack_dithered(message, rows, segments, senders, offset, stream)
