"""unpack_dequantize: packed integer codes of a message back to float rows; inverts quantize_pack.

Shapes: N rows, H columns, b bits, B = ceil(H * b / 8) bytes per row.
"""

from collections.abc import Sequence

import torch

from megatron_moe_comp.ops.quantize_pack import SMALLEST_SCALE, levels, packed_bytes
from megatron_moe_comp.ops.segments import blocks, check

SCHEMA = "(Tensor message, Tensor? row_scales, Tensor(a!) rows, int[] segments) -> ()"


def unpack(packed: torch.Tensor, num_bits: int, num_values: int) -> torch.Tensor:
    """Returns the codes of a little-endian bit stream per row, uint8 [N, num_values].

    Args:
        packed: uint8 [N, ceil(num_values * b / 8)].
        num_bits: b, 1 to 8.
        num_values: codes in a row.
    """
    if num_bits == 8:
        return packed.clone()
    num_rows, num_groups = packed.shape[0], -(-num_values // 8)
    octets = torch.nn.functional.pad(packed, (0, num_groups * num_bits - packed.shape[1]))
    octets = octets.view(num_rows, num_groups, num_bits)
    stream = octets[..., 0].to(torch.int64)
    for i in range(1, num_bits):
        stream |= octets[..., i].to(torch.int64) << 8 * i
    shifts = torch.arange(0, 8 * num_bits, num_bits, device=packed.device)
    codes = (stream[..., None] >> shifts & (1 << num_bits) - 1).to(torch.uint8)
    return codes.flatten(1)[:, :num_values]


def _reference(
    message: torch.Tensor,
    row_scales: torch.Tensor | None,
    rows: torch.Tensor,
    segments: Sequence[int],
) -> None:
    check(segments, rows, row_scales, message)
    hidden = rows.shape[1]
    for first, num_rows, num_bits, codes_offset, scales_offset in blocks(segments, hidden):
        if row_scales is None:
            octets = message[scales_offset : scales_offset + 4 * num_rows]
            # A slice of a message may start anywhere; a view as a wider dtype must start aligned.
            scales = octets.clone().view(torch.float32)
        else:
            scales = row_scales[first : first + num_rows]
        top = levels(num_bits)
        # A NaN scale marks a row that held NaN or Inf: it stays NaN, times whatever code.
        step = torch.where(scales < SMALLEST_SCALE, 0.0, scales) / torch.full_like(scales, top)
        row_bytes = packed_bytes(hidden, num_bits)
        packed = message[codes_offset : codes_offset + num_rows * row_bytes]
        codes = unpack(packed.view(num_rows, row_bytes), num_bits, hidden)
        rows[first : first + num_rows] = ((codes.float() - top) * step[:, None]).to(rows.dtype)


def _fake(
    message: torch.Tensor,
    row_scales: torch.Tensor | None,
    rows: torch.Tensor,
    segments: Sequence[int],
) -> None:
    return None


torch.library.define("megatron_moe_comp::unpack_dequantize", SCHEMA)
torch.library.impl("megatron_moe_comp::unpack_dequantize", "CompositeExplicitAutograd")(_reference)
torch.library.register_fake("megatron_moe_comp::unpack_dequantize")(_fake)


def unpack_dequantize(
    message: torch.Tensor,
    row_scales: torch.Tensor | None,
    rows: torch.Tensor,
    segments: Sequence[int],
) -> None:
    """Writes the rows of a message's segments: (code - L) * (scale / L), computed in float32.

    Args:
        message: uint8 [bytes], as `quantize_pack` left it.
        row_scales: float32 [N], the scales of the rows; None: those in the message. NaN gives a row
            of NaN, a scale below `SMALLEST_SCALE` a row of zeros.
        rows: [N, H], contiguous, of any floating-point dtype; only the rows of the segments are
            written.
        segments: see `segments`; first_row is where the rows go.
    """
    torch.ops.megatron_moe_comp.unpack_dequantize(message, row_scales, rows, segments)
