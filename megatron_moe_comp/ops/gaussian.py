"""gaussian_pack, gaussian_unpack: rows as the best levels for normal values, and back.

Shapes: N rows, H columns, b bits, B = ceil(H * b / 8) bytes per row.
"""

from collections.abc import Sequence

import torch

from megatron_moe_comp.ops.quantize_pack import SMALLEST_SCALE, pack, packed_bytes
from megatron_moe_comp.ops.segments import blocks, check_segments
from megatron_moe_comp.ops.unpack_dequantize import unpack

PACK_SCHEMA = "(Tensor rows, Tensor(a!) message, int[] segments) -> ()"
UNPACK_SCHEMA = "(Tensor message, Tensor(a!) rows, int[] segments) -> ()"

MAX_BITS = 4
WIDTHS = range(2, MAX_BITS + 1)
SCALE_BYTES = 2

MAGNITUDES = {
    2: (0.512579519, 1.709901215),
    3: (0.2525893769, 0.779124595, 1.385007219, 2.217754118),
    4: (
        *(0.1296214479, 0.3917549027, 0.6630324239, 0.9513416097),
        *(1.268230607, 1.633501823, 2.088780297, 2.758691026),
    ),
}
"""The magnitudes of the 2^b levels that represent normal values of variance 1, to the precision of
float32: those of the least mean square error D (Lloyd, 1957; Max, 1960), divided by E[x * level],
which is 1 - D but for the rounding of the thresholds. Each of the former is the mean of its values
and so makes rows shorter; divided, the error is uncorrelated with the value, at D / (1 - D)."""

CELLS = 50
"""Cells per root mean square of a row, which are counted to choose a level."""

THRESHOLDS = {2: (49,), 3: (25, 52, 87), 4: (13, 26, 40, 55, 72, 92, 120)}
"""The cells at which the next of Lloyd's levels is the nearest: to within half a cell, midway
between two of them. Whole numbers fit a byte, and the error is 0.1% from the least."""

_LANES = 32
_CHUNK = 1024


def rms(rows: torch.Tensor) -> torch.Tensor:
    """Returns the scale of each row, bfloat16 [N]: its root mean square, or NaN if not all finite.

    Squares of float32 are exact in float64. They are added in one order on every device: in each
    chunk of 1024 columns, one after the other in 32 lanes of every 32nd column, then the second
    half of the lanes to the first until one is left; then chunk after chunk.

    Args:
        rows: [N, H] of any floating-point dtype.
    """
    num_rows, hidden = rows.shape
    values = torch.nn.functional.pad(rows.float(), (0, -hidden % _LANES)).double()
    # Zeros behind the last column add nothing.
    total = values.new_zeros(num_rows)
    for chunk in values.split(_CHUNK, dim=1):
        lanes = values.new_zeros(num_rows, _LANES)
        for part in chunk.split(_LANES, dim=1):
            lanes = lanes + part.square()
        while lanes.shape[1] > 1:
            first, second = lanes.chunk(2, dim=1)
            lanes = first + second
        total = total + lanes[:, 0]
    # Of two tensors, because torch divides a number by multiplying with a rounded reciprocal.
    scales = (total / torch.full_like(total, max(1, hidden))).sqrt().float()
    finite = torch.isfinite(scales)
    scales = scales.to(torch.bfloat16).clamp(max=torch.finfo(torch.bfloat16).max)
    scales = torch.where(scales.float() < SMALLEST_SCALE, 0.0, scales)
    return torch.where(finite, scales, torch.nan)


def nearest_levels(rows: torch.Tensor, scales: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Returns codes, uint8 [N, H]: whose level it becomes, the most negative one's being 0.

    For example, with a root mean square of 1 and 2 bits, levels -1.71, -0.51, 0.51 and 1.71:

        x = -2.0  ->  cell -100, like 99; the threshold is 49: code 0
        x = -0.01 ->  cell -1, like 0: code 1
        x = 0.97  ->  cell 48: code 2
        x = 0.98  ->  cell 49: code 3

    Args:
        rows: [N, H] of any floating-point dtype; arithmetic is in float32.
        scales: bfloat16 [N], of `rms`. Where it is 0 or NaN, every code is that of 0.
        num_bits: 2 to 4.
    """
    usable = scales > 0
    scales = torch.where(usable, scales.float(), 1.0)
    inverse = torch.full_like(scales, CELLS) / scales
    scaled = torch.where(usable[:, None], rows.float(), 0.0) * inverse[:, None]
    cells = scaled.floor().clamp(-128, 127).to(torch.int8)
    thresholds = torch.tensor(THRESHOLDS[num_bits], dtype=torch.int8)
    thresholds = thresholds.to(rows.device, non_blocking=True)
    # Cell -1 mirrors cell 0.
    mirrored = torch.where(cells < 0, ~cells, cells)
    index = torch.bucketize(mirrored, thresholds, right=True, out_int32=True)
    half = 1 << (num_bits - 1)
    return torch.where(cells < 0, half - 1 - index, half + index).to(torch.uint8)


def _pack_reference(rows: torch.Tensor, message: torch.Tensor, segments: Sequence[int]) -> None:
    check_segments(segments, rows, message, WIDTHS, SCALE_BYTES)
    hidden = rows.shape[1]
    for first, num_rows, num_bits, codes_offset, scales_offset in blocks(
        segments, hidden, SCALE_BYTES
    ):
        part = rows[first : first + num_rows]
        scales = rms(part)
        message[scales_offset : scales_offset + SCALE_BYTES * num_rows] = scales.view(torch.uint8)
        packed = pack(nearest_levels(part, scales, num_bits), num_bits).flatten()
        message[codes_offset : codes_offset + packed.numel()] = packed


def _unpack_reference(message: torch.Tensor, rows: torch.Tensor, segments: Sequence[int]) -> None:
    check_segments(segments, rows, message, WIDTHS, SCALE_BYTES)
    hidden, largest = rows.shape[1], min(torch.finfo(d).max for d in (rows.dtype, torch.float32))
    for first, num_rows, num_bits, codes_offset, scales_offset in blocks(
        segments, hidden, SCALE_BYTES
    ):
        octets = message[scales_offset : scales_offset + SCALE_BYTES * num_rows]
        # A slice of a message may start anywhere; a view as a wider dtype must start aligned.
        scales = octets.clone().view(torch.bfloat16).float()
        row_bytes = packed_bytes(hidden, num_bits)
        packed = message[codes_offset : codes_offset + num_rows * row_bytes]
        codes = unpack(packed.view(num_rows, row_bytes), num_bits, hidden)
        magnitudes = torch.tensor(MAGNITUDES[num_bits], dtype=torch.float32)
        magnitudes = magnitudes.to(rows.device, non_blocking=True)
        levels = torch.cat((-magnitudes.flip(0), magnitudes))
        values = levels[codes.int()] * scales[:, None]
        rows[first : first + num_rows] = values.clamp(-largest, largest).to(rows.dtype)


def _pack_fake(rows: torch.Tensor, message: torch.Tensor, segments: Sequence[int]) -> None:
    return None


def _unpack_fake(message: torch.Tensor, rows: torch.Tensor, segments: Sequence[int]) -> None:
    return None


for _name, _schema, _reference, _fake in (
    ("gaussian_pack", PACK_SCHEMA, _pack_reference, _pack_fake),
    ("gaussian_unpack", UNPACK_SCHEMA, _unpack_reference, _unpack_fake),
):
    torch.library.define(f"megatron_moe_comp::{_name}", _schema)
    torch.library.impl(f"megatron_moe_comp::{_name}", "CompositeExplicitAutograd")(_reference)
    torch.library.register_fake(f"megatron_moe_comp::{_name}")(_fake)


def gaussian_pack(rows: torch.Tensor, message: torch.Tensor, segments: Sequence[int]) -> None:
    """Writes the nearest levels of rows, packed, and their scales into a message.

    For every segment, the codes of its rows go to message[codes_offset:], B bytes per row, and the
    rows' scales, bfloat16, to message[scales_offset:]. See `rms`, `nearest_levels` and `pack`.

    Args:
        rows: [N, H], contiguous, of any floating-point dtype.
        message: uint8 [bytes], on the device of `rows`.
        segments: see `segments`; num_bits 2 to 4.
    """
    torch.ops.megatron_moe_comp.gaussian_pack(rows, message, segments)


def gaussian_unpack(message: torch.Tensor, rows: torch.Tensor, segments: Sequence[int]) -> None:
    """Writes the rows of a message's segments: level times scale, computed in float32.

    Values beyond the range of the rows' dtype become its largest; a scale of NaN gives a row of
    NaN.

    Args:
        message: uint8 [bytes], as `gaussian_pack` left it.
        rows: [N, H], contiguous, of any floating-point dtype; only the rows of the segments are
            written.
        segments: see `segments`; first_row is where the rows go.
    """
    torch.ops.megatron_moe_comp.gaussian_unpack(message, rows, segments)
