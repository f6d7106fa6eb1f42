"""int8: symmetric 8-bit integers with a scale per row, rounded to nearest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_moe_comp import ops
from megatron_moe_comp.compression.codec import TensorCodec
from megatron_moe_comp.compression.codecs.scaling import normalized
from megatron_moe_comp.compression.payload import Section
from megatron_moe_comp.compression.random_stream import RandomStream

_TOP = 127.0


@dataclass(frozen=True)
class Int8(TensorCodec):
    """Integers from -127 to 127 in steps of s / 127; s, the row's largest magnitude, is sent.

    8 + 32 / H bits per value: 8.125 at H = 256. Biased: a value always rounds the same way, at
    most s / 254 off, so an outlier costs its own row precision. Zeros stay zeros. A row with NaN
    or infinity anywhere arrives as NaN everywhere.
    """

    name: ClassVar[str] = "int8"

    def sections(self, hidden_size: int, dtype: torch.dtype, num_bits: int) -> tuple[Section, ...]:
        """Returns the codes and the scales."""
        return Section("codes", row_bytes=hidden_size), Section("scales", row_bytes=4)

    def encode_rows(
        self, rows: torch.Tensor, row_numbers: torch.Tensor, num_bits: int, random: RandomStream
    ) -> tuple[torch.Tensor, ...]:
        """Returns codes, int8 [N, H], and scales, float32 [N, 1]."""
        scales = ops.absmax(rows)[:, None]
        return (normalized(rows, scales) * _TOP).round().to(torch.int8), scales

    def decode_rows(
        self, parts: Sequence[torch.Tensor], num_bits: int, hidden_size: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Returns code / 127 * scale."""
        # In this order nothing overflows, and the largest magnitude arrives exactly.
        values = parts[0].view(torch.int8).float() / _TOP * parts[1].view(torch.float32)
        return values.to(dtype)
