"""pwlq: piecewise linear quantization, fine steps around zero and coarse ones in the tails."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_moe_comp import ops
from megatron_moe_comp.compression.codec import TensorCodec
from megatron_moe_comp.compression.codecs.scaling import normalized
from megatron_moe_comp.compression.payload import Section
from megatron_moe_comp.compression.random_stream import RandomStream
from megatron_moe_comp.ops.quantize_pack import pack
from megatron_moe_comp.ops.unpack_dequantize import unpack


@dataclass(frozen=True)
class PiecewiseLinearQuantization(TensorCodec):
    """Two evenly spaced sets of magnitudes, below and from a breakpoint p, chosen for each row.

    A code of b bits is a sign, a region and an index i below n = 2^(b-2): the magnitude is
    i / n * p, or p + i / (n - 1) * (m - p) with m the row's largest. A value becomes the nearest
    level. With r = m / (root mean square of the row), p / m = ln(0.8614 r + 0.6079) / r, the best
    for normal values. The encoder alone computes p; p and m, two float32 per row, are sent:
    b + 64 / H bits per value, 6.25 at H = 256 and b = 6.

    Biased: a value always rounds the same way, at most p / 2n off below p and (m - p) / 2(n - 1)
    above, so an outlier costs its own row precision. Zeros stay zeros. A row with NaN or infinity
    anywhere arrives as NaN everywhere.

    Source: Fang et al., "Post-Training Piecewise Linear Quantization for Deep Neural Networks",
    ECCV 2020, for whole tensors; there both regions have a level at p, here only the outer one.
    """

    name: ClassVar[str] = "pwlq"
    num_bits_range: ClassVar[tuple[int, int] | None] = (3, 8)

    def sections(self, hidden_size: int, dtype: torch.dtype, num_bits: int) -> tuple[Section, ...]:
        """Returns the codes, and p and m."""
        codes = Section("codes", row_bytes=ops.packed_bytes(hidden_size, num_bits))
        return codes, Section("scales", row_bytes=8)

    def encode_rows(
        self, rows: torch.Tensor, row_numbers: torch.Tensor, num_bits: int, random: RandomStream
    ) -> tuple[torch.Tensor, ...]:
        """Returns codes, packed, and p and m, float32 [N, 2]."""
        largest = ops.absmax(rows)[:, None]
        units = normalized(rows, largest)
        # At least 1 / H, unless all units are zero.
        mean_square = units.square().mean(dim=1, keepdim=True).clamp(min=1 / rows.shape[1])
        ratio = mean_square.rsqrt()
        breakpoints = (0.8614 * ratio + 0.6079).log() / ratio
        magnitudes, count = units.abs(), 1 << (num_bits - 2)
        dense = magnitudes / breakpoints * count
        tail = count + (magnitudes - breakpoints) / (1 - breakpoints) * (count - 1)
        codes = torch.where(magnitudes < breakpoints, dense, tail).round()
        codes += (units < 0) * (2 * count)
        scales = torch.cat((breakpoints * largest, largest), dim=1)
        return pack(codes.to(torch.uint8), num_bits), scales

    def decode_rows(
        self, parts: Sequence[torch.Tensor], num_bits: int, hidden_size: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Returns the levels."""
        breakpoints, largest = parts[1].view(torch.float32).split(1, dim=1)
        codes, count = unpack(parts[0], num_bits, hidden_size), 1 << (num_bits - 2)
        levels = (codes & 2 * count - 1).float()
        # Weighted so that the largest magnitude arrives exactly.
        fractions = (levels - count) / (count - 1)
        tail = breakpoints * (1 - fractions) + largest * fractions
        magnitudes = torch.where(levels < count, levels / count * breakpoints, tail)
        return torch.where(codes < 2 * count, magnitudes, -magnitudes).to(dtype)
