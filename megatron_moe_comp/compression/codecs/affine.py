"""What lq and shapeshifter share: evenly spaced levels from a smallest to a largest value."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from megatron_moe_comp import ops
from megatron_moe_comp.compression.codec import TensorCodec
from megatron_moe_comp.compression.payload import Section
from megatron_moe_comp.compression.random_stream import RandomStream
from megatron_moe_comp.ops.quantize_pack import pack
from megatron_moe_comp.ops.unpack_dequantize import unpack


class Affine(TensorCodec):
    """Codes 0 .. 2^b - 1 for the levels of a range, whose two ends are sent and arrive exactly."""

    num_bits_range: ClassVar[tuple[int, int] | None] = (2, 8)
    range_section: ClassVar[Section]
    """Two float32, the ends."""

    @abstractmethod
    def ranges(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the smallest and largest values [1 or N, 1] of what shares a range."""

    def sections(self, hidden_size: int, dtype: torch.dtype, num_bits: int) -> tuple[Section, ...]:
        """Returns the codes and the ranges."""
        codes = Section("codes", row_bytes=ops.packed_bytes(hidden_size, num_bits))
        return codes, self.range_section

    def encode_rows(
        self, rows: torch.Tensor, row_numbers: torch.Tensor, num_bits: int, random: RandomStream
    ) -> tuple[torch.Tensor, ...]:
        """Returns codes, packed, and ranges, float32 [1 or N, 2]."""
        ends = torch.cat(self.ranges(rows), dim=1).float()
        ends = torch.where(ends.isfinite().all(dim=1, keepdim=True), ends, torch.nan)
        # Of halves, because the width of a range may overflow.
        low, high = (ends / 2).split(1, dim=1)
        width = high - low
        has_width = width > 0
        fractions = (rows.float() / 2 - low) / torch.where(has_width, width, 1.0)
        codes = torch.where(has_width, fractions, 0.0) * ((1 << num_bits) - 1)
        return pack(codes.round().to(torch.uint8), num_bits), ends

    def decode_rows(
        self, parts: Sequence[torch.Tensor], num_bits: int, hidden_size: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Returns the levels."""
        low, high = parts[1].view(torch.float32).split(1, dim=1)
        fractions = unpack(parts[0], num_bits, hidden_size).float() / ((1 << num_bits) - 1)
        return (low * (1 - fractions) + high * fractions).to(dtype)
