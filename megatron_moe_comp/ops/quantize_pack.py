"""quantize_pack: float rows to densely packed, unbiasedly rounded integer codes.

Shapes: N rows, H columns, b bits, B = ceil(H * b / 8) bytes per row.
"""

from collections.abc import Iterator

import torch

from megatron_moe_comp.ops.philox import random_halves

SCHEMA = "(Tensor rows, Tensor row_scales, int num_bits, int key, int offset, int stream) -> Tensor"

SMALLEST_SCALE = 2.0**-100
"""A row whose largest magnitude is below this (8e-31) is a row of zeros: L / scale must not
overflow float32."""

_BLOCK_VALUES = 1 << 18
"""Values that the references work on at once, so that their int64 temporaries stay in the cache."""


def levels(num_bits: int) -> int:
    """Returns L, the number of magnitude levels of a signed code: 2^(b-1) - 1."""
    return (1 << (num_bits - 1)) - 1


def packed_bytes(num_values: int, num_bits: int) -> int:
    """Returns the bytes that `num_values` codes of `num_bits` bits fill."""
    return -(-num_values * num_bits // 8)


def row_blocks(num_rows: int, row_values: int) -> Iterator[slice]:
    """Yields the slices of rows, about `_BLOCK_VALUES` values each, that make up all rows."""
    block = max(1, _BLOCK_VALUES // max(1, row_values))
    for first in range(0, num_rows, block):
        yield slice(first, min(first + block, num_rows))


def quantize(
    rows: torch.Tensor,
    row_scales: torch.Tensor,
    num_bits: int,
    first_row: int,
    *,
    key: int,
    offset: int,
    stream: int,
) -> torch.Tensor:
    """Returns codes q + L in [0, 2L], uint8 [N, H], with E[q * scale / L] = x.

    BirdMoE's RQ (Wu et al., DAC 2025): u = |x| / s * L; l = floor(u) + Bernoulli(u - floor(u));
    q = sign(x) * l. The Bernoulli draw compares sixteen random bits with the fraction of u in
    16.16 fixed point, so it is integer arithmetic. For example, with s = 1 and 3 bits (L = 3):

        x = 0.0  ->  u = 0.0   q = 0
        x = 0.5  ->  u = 1.5   q = 1 or 2, equally likely
        x = -1.0 ->  u = 3.0   q = -3

    Args:
        rows: [N, H] of any floating-point dtype; arithmetic is in float32.
        row_scales: float32 [N], s >= max|x| of the row. A scale below `SMALLEST_SCALE`, NaN or
            infinite gives codes of zero, whatever the row holds.
        num_bits: 2 to 8.
        first_row: number of the first row in the random stream.
        key: with offset and stream, which random numbers are used; see `philox`.
        offset: see key.
        stream: see key.
    """
    top = levels(num_bits)
    num_rows, hidden = rows.shape
    usable = torch.isfinite(row_scales) & (row_scales >= SMALLEST_SCALE)
    inverse = torch.where(usable, top / row_scales, 0.0)
    x = rows.float()
    # |x| * inverse is at most L up to rounding; clamped as a float, before it becomes an integer.
    u = (x.abs() * inverse[:, None]).nan_to_num(nan=0.0).clamp_(0.0, float(top))
    fixed_point = (u * 65536.0 + 0.5).to(torch.int32)
    fixed_point.masked_fill_(~usable[:, None], 0)
    row_numbers = torch.arange(first_row, first_row + num_rows, device=rows.device)
    halves = random_halves(row_numbers, -(-hidden // 8), key=key, offset=offset, stream=stream)
    magnitude = (fixed_point + halves.flatten(1)[:, :hidden]) >> 16
    return (torch.where(x < 0, -magnitude, magnitude) + top).to(torch.uint8)


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
    rows: torch.Tensor, row_scales: torch.Tensor, num_bits: int, key: int, offset: int, stream: int
) -> torch.Tensor:
    num_rows, hidden = rows.shape
    packed = rows.new_empty((num_rows, packed_bytes(hidden, num_bits)), dtype=torch.uint8)
    for part in row_blocks(num_rows, hidden):
        codes = quantize(
            rows[part],
            row_scales[part],
            num_bits,
            part.start,
            key=key,
            offset=offset,
            stream=stream,
        )
        packed[part] = pack(codes, num_bits)
    return packed


def _fake(
    rows: torch.Tensor, row_scales: torch.Tensor, num_bits: int, key: int, offset: int, stream: int
) -> torch.Tensor:
    return rows.new_empty((rows.shape[0], packed_bytes(rows.shape[1], num_bits)), dtype=torch.uint8)


torch.library.define("megatron_moe_comp::quantize_pack", SCHEMA)
torch.library.impl("megatron_moe_comp::quantize_pack", "CompositeExplicitAutograd")(_reference)
torch.library.register_fake("megatron_moe_comp::quantize_pack")(_fake)


def quantize_pack(
    rows: torch.Tensor, row_scales: torch.Tensor, num_bits: int, key: int, offset: int, stream: int
) -> torch.Tensor:
    """Returns quantized and packed rows, uint8 [N, ceil(H * b / 8)]; see `quantize` and `pack`."""
    return torch.ops.megatron_moe_comp.quantize_pack(
        rows, row_scales, num_bits, key, offset, stream
    )
