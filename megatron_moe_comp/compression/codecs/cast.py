"""bf16 and fp16: rows in a 16-bit floating-point format."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_moe_comp.compression.codec import TensorCodec
from megatron_moe_comp.compression.codecs.scaling import saturated
from megatron_moe_comp.compression.payload import Section
from megatron_moe_comp.compression.random_stream import RandomStream


class _Cast(TensorCodec):
    """Sends rows in `wire_dtype`, rounded to nearest; exact for rows of that dtype.

    16 bits per value, biased only as any rounding to nearest. Finite values beyond the range of
    the format, or of the rows' own dtype on arrival, become its largest; NaN and infinities arrive
    as they are.
    """

    wire_dtype: ClassVar[torch.dtype]

    def sections(self, hidden_size: int, dtype: torch.dtype, num_bits: int) -> tuple[Section, ...]:
        """Returns one section, the rows."""
        return (Section("rows", row_bytes=hidden_size * self.wire_dtype.itemsize),)

    def encode_rows(
        self, rows: torch.Tensor, row_numbers: torch.Tensor, num_bits: int, random: RandomStream
    ) -> tuple[torch.Tensor, ...]:
        """Returns the rows in the format of the wire."""
        return (saturated(rows, self.wire_dtype),)

    def decode_rows(
        self, parts: Sequence[torch.Tensor], num_bits: int, hidden_size: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Returns the rows in their own dtype."""
        # bfloat16 rounds the largest float16 numbers up, out of float16's range.
        return saturated(parts[0].view(self.wire_dtype), dtype)


@dataclass(frozen=True)
class BFloat16Cast(_Cast):
    """Rows in bfloat16: float32's range, 8 bits of precision; 16 bits per value."""

    name: ClassVar[str] = "bf16"
    wire_dtype: ClassVar[torch.dtype] = torch.bfloat16


@dataclass(frozen=True)
class Float16Cast(_Cast):
    """Rows in IEEE float16: 11 bits of precision, range 6e-8 to 65504; 16 bits per value."""

    name: ClassVar[str] = "fp16"
    wire_dtype: ClassVar[torch.dtype] = torch.float16
