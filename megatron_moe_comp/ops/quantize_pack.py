"""quantize_pack: float rows to densely packed, unbiasedly rounded integer codes in a message.

Shapes: N rows, H columns, b bits, B = ceil(H * b / 8) bytes per row.
"""

from collections.abc import Sequence

import torch

from megatron_moe_comp.ops.philox import random_halves
from megatron_moe_comp.ops.segments import blocks, check

SCHEMA = (
    "(Tensor rows, Tensor? row_scales, Tensor(a!) message, int[] segments, "
    "int key, int offset, int stream, bool mid_rise=False) -> ()"
)

SMALLEST_SCALE = 2.0**-100
"""A row whose largest magnitude is below this (8e-31) is a row of zeros: the inverse of its step
must not overflow float32."""

_ONE = 65536.0
"""1 in the 16.16 fixed point in which values are rounded."""


def levels(num_bits: int) -> int:
    """Returns L, the number of magnitude levels of a signed code: 2^(b-1) - 1."""
    return (1 << (num_bits - 1)) - 1


def top_level(num_bits: int, *, mid_rise: bool) -> float:
    """Returns the outermost level: L, or with mid-rise levels L + 1/2, as none is at zero."""
    return levels(num_bits) + 0.5 * mid_rise


def packed_bytes(num_values: int, num_bits: int) -> int:
    """Returns the bytes that `num_values` codes of `num_bits` bits fill."""
    return -(-num_values * num_bits // 8)


def absmax(rows: torch.Tensor) -> torch.Tensor:
    """Returns the scale of each row, float32 [N]: its largest magnitude, or NaN if not all finite.

    Args:
        rows: [N, H] of any floating-point dtype.
    """
    if not rows.numel():
        return rows.new_zeros(len(rows), dtype=torch.float32)
    # aminmax keeps NaN; -min and max rather than abs() spare a copy of the rows.
    low, high = rows.aminmax(dim=1)
    # Adding zero makes the -0.0 that a row of zeros may give a 0.0 on every device.
    scales = torch.maximum(-low, high).float() + 0.0
    # An infinite scale would decode zeros to NaN and everything else to it too: say NaN.
    return torch.where(torch.isfinite(scales), scales, torch.nan)


def quantize(
    rows: torch.Tensor,
    row_scales: torch.Tensor,
    num_bits: int,
    first_row: int,
    *,
    key: int,
    offset: int,
    stream: int,
    mid_rise: bool = False,
) -> torch.Tensor:
    """Returns codes q + L in [0, 2L], uint8 [N, H], with E[q * scale / L] = x.

    BirdMoE's RQ (Wu et al., DAC 2025): a value between two levels becomes the upper one with the
    probability that makes the expectation exact, q = floor(u) + Bernoulli(u - floor(u)) with
    u = x / s * L. (The paper rounds |x| and restores the sign: the same distribution.) The draw
    adds sixteen random bits to u + L in 16.16 fixed point and drops the fraction, so zeros stay
    zeros.
    For example, with s = 1 and 3 bits (L = 3):

        x = 0.0  ->  u = 0.0   q = 0
        x = 0.5  ->  u = 1.5   q = 1 or 2, equally likely
        x = -1.0 ->  u = -3.0  q = -3

    With mid-rise levels, u = x / s * (L + 1/2) and the codes, floor(u + L + 1/2 + r) with r the
    random part of 1, are in [0, 2L + 1]: the steps are smaller and no code is left over, but only
    with r can a code be decoded without a bias: see `dequantize_dithered`.

    Args:
        rows: [N, H] of any floating-point dtype; arithmetic is in float32.
        row_scales: float32 [N], s >= max|x| of the row. With a scale below `SMALLEST_SCALE` or not
            finite, every code of the row is L.
        num_bits: 2 to 8.
        first_row: number of the first row in the random stream.
        key: with offset and stream, which random numbers are used; see `philox`.
        offset: see key.
        stream: see key.
        mid_rise: whether levels are odd multiples of half a step, so that all 2^b are in use.
    """
    num_rows, hidden = rows.shape
    top = top_level(num_bits, mid_rise=mid_rise) * _ONE
    usable = torch.isfinite(row_scales) & (row_scales >= SMALLEST_SCALE)
    scales = torch.where(usable, row_scales, 1.0)
    # Of two tensors, because torch divides a number by multiplying with a rounded reciprocal.
    inverse = torch.full_like(scales, top) / scales
    # Rounded down where it was rounded up, no |x| <= s can pass the top level.
    below = (inverse.view(torch.int32) - 1).view(torch.float32)
    inverse = torch.where(inverse * scales > top, below, inverse)
    # Each operation rounds once, to nearest; a fused multiply-add would give other bytes.
    shifted = rows.float() * inverse[:, None] + top
    zero = levels(num_bits) * _ONE
    fixed_point = torch.where(usable[:, None], shifted, zero).round_().to(torch.int32)
    row_numbers = torch.arange(first_row, first_row + num_rows, device=rows.device)
    halves = random_halves(row_numbers, -(-hidden // 8), key=key, offset=offset, stream=stream)
    return ((fixed_point + halves.flatten(1)[:, :hidden]) >> 16).to(torch.uint8)


def pack(codes: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Returns the codes as a little-endian bit stream per row, uint8 [N, ceil(H * b / 8)].

    Value i of a row is at bits [i * b, i * b + b), so eight codes fill b bytes; the bits behind
    the last value are zero. For example, 3 bits: codes 1 2 3 4 5 6 7 0 are the bytes d1 58 1f.

    Args:
        codes: uint8 [N, H], below 2^b.
        num_bits: b, 1 to 8.
    """
    num_rows, num_values = codes.shape
    if num_bits == 8:
        return codes.clone()
    num_groups = -(-num_values // 8)
    groups = torch.nn.functional.pad(codes, (0, -num_values % 8)).view(num_rows, num_groups, 8)
    stream = groups[..., 0].to(torch.int64)
    for i in range(1, 8):
        stream |= groups[..., i].to(torch.int64) << i * num_bits
    shifts = torch.arange(0, 8 * num_bits, 8, device=codes.device)
    octets = (stream[..., None] >> shifts & 0xFF).to(torch.uint8)
    return octets.flatten(1)[:, : packed_bytes(num_values, num_bits)].contiguous()


def _reference(
    rows: torch.Tensor,
    row_scales: torch.Tensor | None,
    message: torch.Tensor,
    segments: Sequence[int],
    key: int,
    offset: int,
    stream: int,
    mid_rise: bool = False,
) -> None:
    check(segments, rows, row_scales, message)
    if not (0 <= offset < 2**32 and 0 <= stream < 2**32):
        raise ValueError(f"offset and stream must be 0 to 2^32 - 1, not {offset} and {stream}")
    hidden = rows.shape[1]
    for first, num_rows, num_bits, codes_offset, scales_offset in blocks(segments, hidden):
        part = rows[first : first + num_rows]
        if row_scales is None:
            scales = absmax(part)
            message[scales_offset : scales_offset + 4 * num_rows] = scales.view(torch.uint8)
        else:
            scales = row_scales[first : first + num_rows]
        random = {"key": key, "offset": offset, "stream": stream}
        codes = quantize(part, scales, num_bits, first, **random, mid_rise=mid_rise)
        packed = pack(codes, num_bits).flatten()
        message[codes_offset : codes_offset + packed.numel()] = packed


def _fake(
    rows: torch.Tensor,
    row_scales: torch.Tensor | None,
    message: torch.Tensor,
    segments: Sequence[int],
    key: int,
    offset: int,
    stream: int,
    mid_rise: bool = False,
) -> None:
    return None


torch.library.define("megatron_moe_comp::quantize_pack", SCHEMA)
torch.library.impl("megatron_moe_comp::quantize_pack", "CompositeExplicitAutograd")(_reference)
torch.library.register_fake("megatron_moe_comp::quantize_pack")(_fake)


def quantize_pack(
    rows: torch.Tensor,
    row_scales: torch.Tensor | None,
    message: torch.Tensor,
    segments: Sequence[int],
    *,
    key: int,
    offset: int,
    stream: int,
    mid_rise: bool = False,
) -> None:
    """Writes rows, quantized and packed, into a message; see `absmax`, `quantize` and `pack`.

    For every segment, the codes of its rows go to message[codes_offset:], B bytes per row, and
    without `row_scales` the rows' scales, float32, to message[scales_offset:]. A row's number in
    the random stream is its index in `rows`, so the bytes do not depend on how rows are divided
    into segments or calls.

    Args:
        rows: [N, H], contiguous, of any floating-point dtype.
        row_scales: float32 [N], at least the largest magnitude of each row; None: `absmax`.
        message: uint8 [bytes], on the device of `rows`.
        segments: see `segments`; num_bits 2 to 8.
        key: 64 bits, with offset and stream (32 bits each) which random numbers are used.
        offset: see key.
        stream: see key.
        mid_rise: see `quantize`.
    """
    torch.ops.megatron_moe_comp.quantize_pack(
        rows, row_scales, message, segments, key, offset, stream, mid_rise
    )
