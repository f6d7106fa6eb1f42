"""cast_pack, unpack_cast: float rows to small floating-point numbers in a message, and back.

Shapes: N rows, H columns; blocks of a row share a scale where the format has one, and the last
block is shorter where H is not a multiple of the block's size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from megatron_moe_comp.ops.quantize_pack import SMALLEST_SCALE, absmax
from megatron_moe_comp.ops.segments import OpSegment, blocks, check_segments

PACK_SCHEMA = "(Tensor rows, Tensor(a!) message, int[] segments, str format) -> ()"
UNPACK_SCHEMA = "(Tensor message, Tensor(a!) rows, int[] segments, str format) -> ()"

_LARGEST = 448.0
"""The largest E4M3 number; torch's `float8_e4m3fn` has no infinity."""
_LARGEST_EXPONENT = 8
"""Of an E4M3 number: 448 = 1.75 * 2^8."""
_MANTISSA_BITS = 23
"""Of float32."""
_E8M0_NAN = 255


def float32_scales(absmax: torch.Tensor) -> torch.Tensor:
    """Returns absmax / 448, float32 [M].

    Args:
        absmax: float32 [M], the largest magnitude of each block; NaN if not all are finite.
    """
    # Any scale that rounds the values to zero will do for blocks of zeros. Of two tensors, because
    # torch may divide by a number by multiplying with a rounded reciprocal.
    scales = absmax / torch.full_like(absmax, _LARGEST)
    return torch.where(absmax < SMALLEST_SCALE, 1.0, scales)


def e8m0_scales(absmax: torch.Tensor) -> torch.Tensor:
    """Returns 2^(floor(log2(absmax)) - 8), at least 2^-127, float8_e8m0fnu [M].

    Args:
        absmax: see `float32_scales`.
    """
    # The only field is an exponent biased by 127 as float32's is.
    exponents = (absmax.view(torch.int32) >> _MANTISSA_BITS) - _LARGEST_EXPONENT
    codes = torch.where(absmax.isnan(), _E8M0_NAN, exponents.clamp(min=0))
    return codes.to(torch.uint8).view(torch.float8_e8m0fnu)


@dataclass(frozen=True)
class CastFormat:
    """Numbers of a floating-point format and, with a `block_size`, a scale per block of a row."""

    dtype: torch.dtype
    block_size: int = 0
    scale_dtype: torch.dtype = torch.float32
    scales: Callable[[torch.Tensor], torch.Tensor] = float32_scales
    """From the largest magnitudes of blocks, all above zero or NaN."""

    @property
    def num_bits(self) -> int:
        """Bits of a number."""
        return 8 * self.dtype.itemsize

    def row_scale_bytes(self, hidden_size: int) -> int:
        """Returns the bytes of a row's scales."""
        if not self.block_size:
            return 0
        return -(-hidden_size // self.block_size) * self.scale_dtype.itemsize


CAST_FORMATS = {
    "bf16": CastFormat(torch.bfloat16),
    "fp16": CastFormat(torch.float16),
    "fp8": CastFormat(torch.float8_e4m3fn, 128),
    "mxfp8": CastFormat(torch.float8_e4m3fn, 32, torch.float8_e8m0fnu, e8m0_scales),
}


def saturated(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the values in `dtype`; finite ones beyond its range become its largest.

    NaN and infinities stay what they are; values of that dtype stay, bit for bit.
    """
    if values.dtype == dtype:
        return values
    values = values.float()
    limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return torch.where(values.isinf(), values, values.clamp(-limit, limit)).to(dtype)


def encode(rows: torch.Tensor, form: CastFormat) -> tuple[torch.Tensor, ...]:
    """Returns the numbers [N, H] and, if the format has them, the scales [N, blocks] of rows."""
    if not form.block_size:
        return (saturated(rows, form.dtype),)
    num_rows, hidden = rows.shape
    blocks = pad(rows, (0, -hidden % form.block_size)).view(-1, form.block_size)
    scales = form.scales(absmax(blocks))
    # Clamped because a cast beyond the range may give NaN, depending on torch's version.
    units = (blocks.float() / scales.float()[:, None]).clamp(-_LARGEST, _LARGEST)
    numbers = units.to(form.dtype).view(num_rows, -1)[:, :hidden]
    return numbers, scales.view(num_rows, -1)


def decode(parts: Sequence[torch.Tensor], form: CastFormat, dtype: torch.dtype) -> torch.Tensor:
    """Returns rows [N, H] in `dtype`: the numbers, times their scales if the format has them.

    Args:
        parts: as `encode` returns them.
        form: the format.
        dtype: of the rows.
    """
    # Saturated, since bfloat16 rounds the largest float16 numbers up, out of float16's range.
    if not form.block_size:
        return saturated(parts[0], dtype)
    numbers, scales = parts
    row_scales = scales.float().repeat_interleave(form.block_size, dim=1)[:, : numbers.shape[1]]
    return saturated(numbers.float() * row_scales, dtype)


def _checked(
    rows: torch.Tensor, message: torch.Tensor, table: Sequence[int], name: str
) -> tuple[CastFormat, list[list[OpSegment]]]:
    """Returns the format and the segments to work on at once.

    On a CPU a block of rows, whose temporaries stay in the cache; elsewhere all: few launches.

    Raises:
        ValueError: no such format, or the tensors do not have the right form or size.
    """
    if name not in CAST_FORMATS:
        raise ValueError(f"format must be one of {', '.join(CAST_FORMATS)}, not {name}")
    form, hidden = CAST_FORMATS[name], rows.shape[-1]
    scale_bytes = form.row_scale_bytes(hidden)
    check_segments(table, rows, message, range(form.num_bits, form.num_bits + 1), scale_bytes)
    segments = [s for s in blocks(table, hidden, scale_bytes) if s.num_rows and hidden]
    if rows.device.type == "cpu":
        return form, [[s] for s in segments]
    return form, [segments] if segments else []


def _row_slices(rows: torch.Tensor, group: Sequence[OpSegment]) -> list[torch.Tensor]:
    return [rows[s.first_row : s.first_row + s.num_rows] for s in group]


def _message_slices(
    message: torch.Tensor, group: Sequence[OpSegment], form: CastFormat, hidden: int
) -> list[list[torch.Tensor]]:
    """Returns where the numbers and, if the format has them, the scales of each segment are."""
    number_bytes, scale_bytes = hidden * form.dtype.itemsize, form.row_scale_bytes(hidden)
    slices = [[message[s.codes_offset :][: s.num_rows * number_bytes] for s in group]]
    if scale_bytes:
        slices.append([message[s.scales_offset :][: s.num_rows * scale_bytes] for s in group])
    return slices


def _pack_reference(
    rows: torch.Tensor, message: torch.Tensor, segments: Sequence[int], format: str
) -> None:
    form, groups = _checked(rows, message, segments, format)
    for group in groups:
        parts = encode(torch.cat(_row_slices(rows, group)), form)
        places = _message_slices(message, group, form, rows.shape[1])
        for part, slices in zip(parts, places, strict=True):
            octets = part.contiguous().view(torch.uint8).flatten()
            torch._foreach_copy_(slices, octets.split([len(s) for s in slices]))


def _unpack_reference(
    message: torch.Tensor, rows: torch.Tensor, segments: Sequence[int], format: str
) -> None:
    form, groups = _checked(rows, message, segments, format)
    for group in groups:
        places = _message_slices(message, group, form, rows.shape[1])
        num_rows = sum(s.num_rows for s in group)
        parts = [
            # A slice of a message may start anywhere; a view as a wider dtype must start aligned.
            torch.cat(slices).view(dtype).view(num_rows, -1)
            for slices, dtype in zip(places, (form.dtype, form.scale_dtype), strict=False)
        ]
        decoded = decode(parts, form, rows.dtype)
        torch._foreach_copy_(_row_slices(rows, group), decoded.split([s.num_rows for s in group]))


def _fake(source: torch.Tensor, target: torch.Tensor, segments: Sequence[int], format: str) -> None:
    return None


for _name, _schema, _reference in (
    ("cast_pack", PACK_SCHEMA, _pack_reference),
    ("unpack_cast", UNPACK_SCHEMA, _unpack_reference),
):
    torch.library.define(f"megatron_moe_comp::{_name}", _schema)
    torch.library.impl(f"megatron_moe_comp::{_name}", "CompositeExplicitAutograd")(_reference)
    torch.library.register_fake(f"megatron_moe_comp::{_name}")(_fake)


def cast_pack(
    rows: torch.Tensor, message: torch.Tensor, segments: Sequence[int], format: str
) -> None:
    """Writes rows as small floating-point numbers into a message; see `encode`.

    For every segment, the numbers of its rows go to message[codes_offset:], and their scales, if
    the format has them, to message[scales_offset:]. Numbers are rounded to nearest, ties to even;
    finite ones beyond the format become its largest. bf16 and fp16 keep NaN and infinities, and
    rows of their own dtype bit for bit; a block with one gets a scale of NaN. For example, in
    mxfp8 a block of 1.0, 3.0 and zeros has a scale of 2^-7 (byte 120), and 1.0 is the number 128:

        1.0 = 2^7 * 2^-7    ->  0x70, exponent 7 + 7, mantissa 0
        3.0 = 384 * 2^-7    ->  0x7c, exponent 8 + 7, mantissa 4

    Args:
        rows: [N, H], contiguous, of any floating-point dtype.
        message: uint8 [bytes], on the device of `rows`.
        segments: see `segments`; num_bits is that of a number: 16, or 8 in fp8 and mxfp8.
        format: a name of `CAST_FORMATS`.
    """
    torch.ops.megatron_moe_comp.cast_pack(rows, message, segments, format)


def unpack_cast(
    message: torch.Tensor, rows: torch.Tensor, segments: Sequence[int], format: str
) -> None:
    """Writes the rows of a message's segments: the numbers, times their scales in float32.

    Args:
        message: uint8 [bytes], as `cast_pack` left it.
        rows: [N, H], contiguous, of any floating-point dtype; only the rows of the segments are
            written. Finite values beyond their range become its largest.
        segments: see `cast_pack`; first_row is where the rows go.
        format: see `cast_pack`.
    """
    torch.ops.megatron_moe_comp.unpack_cast(message, rows, segments, format)
