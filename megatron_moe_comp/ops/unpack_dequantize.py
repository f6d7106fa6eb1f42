"""unpack_dequantize: packed integer codes back to float rows; the inverse of quantize_pack.

Shapes: N rows, H columns, b bits, B = ceil(H * b / 8) bytes per row.
"""

import torch

from megatron_moe_comp.ops.quantize_pack import SMALLEST_SCALE, levels, row_blocks

SCHEMA = (
    "(Tensor packed, Tensor row_scales, int num_bits, int hidden_size, ScalarType dtype) -> Tensor"
)


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
    packed: torch.Tensor,
    row_scales: torch.Tensor,
    num_bits: int,
    hidden_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    num_rows, top = packed.shape[0], levels(num_bits)
    # A NaN scale marks a row that held NaN or Inf: it stays NaN, times whatever code.
    scales = torch.where(row_scales < SMALLEST_SCALE, 0.0, row_scales)
    step = scales / top
    rows = packed.new_empty((num_rows, hidden_size), dtype=dtype)
    for part in row_blocks(num_rows, hidden_size):
        codes = unpack(packed[part], num_bits, hidden_size)
        rows[part] = ((codes.float() - top) * step[part, None]).to(dtype)
    return rows


def _fake(
    packed: torch.Tensor,
    row_scales: torch.Tensor,
    num_bits: int,
    hidden_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return packed.new_empty((packed.shape[0], hidden_size), dtype=dtype)


torch.library.define("megatron_moe_comp::unpack_dequantize", SCHEMA)
torch.library.impl("megatron_moe_comp::unpack_dequantize", "CompositeExplicitAutograd")(_reference)
torch.library.register_fake("megatron_moe_comp::unpack_dequantize")(_fake)


def unpack_dequantize(
    packed: torch.Tensor,
    row_scales: torch.Tensor,
    num_bits: int,
    hidden_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Returns rows of `dtype`, [N, H]: (code - L) * (scale / L), computed in float32.

    Args:
        packed: uint8 [N, ceil(H * b / 8)] of `quantize_pack`.
        row_scales: float32 [N], the scales given to `quantize_pack`; NaN gives a row of NaN.
        num_bits: b, 2 to 8.
        hidden_size: H.
        dtype: of the result.
    """
    return torch.ops.megatron_moe_comp.unpack_dequantize(
        packed, row_scales, num_bits, hidden_size, dtype
    )
