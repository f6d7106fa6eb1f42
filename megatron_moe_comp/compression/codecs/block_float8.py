"""What fp8 and mxfp8 share: float8 E4M3 numbers with one scale per block of a row."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch.nn.functional import pad

from megatron_moe_comp import ops
from megatron_moe_comp.compression.codec import TensorCodec
from megatron_moe_comp.compression.payload import Section
from megatron_moe_comp.compression.random_stream import RandomStream

LARGEST = 448.0
"""The largest E4M3 number; torch's `float8_e4m3fn` has no infinity."""


class BlockFloat8(TensorCodec):
    """Values divided by the scale of their block, rounded to the nearest E4M3 number.

    The last block of a row is shorter where the hidden size is not a multiple of the block's.
    """

    block_size: ClassVar[int]
    scale_dtype: ClassVar[torch.dtype]

    @abstractmethod
    def scales(self, absmax: torch.Tensor) -> torch.Tensor:
        """Returns scales, `scale_dtype` [M], all above zero or NaN.

        Args:
            absmax: float32 [M], the largest magnitude of each block; NaN if not all are finite.
        """

    def sections(self, hidden_size: int, dtype: torch.dtype, num_bits: int) -> tuple[Section, ...]:
        """Returns the numbers and the scales."""
        num_blocks = -(-hidden_size // self.block_size)
        return (
            Section("numbers", row_bytes=hidden_size),
            Section("scales", row_bytes=num_blocks * self.scale_dtype.itemsize),
        )

    def encode_rows(
        self, rows: torch.Tensor, row_numbers: torch.Tensor, num_bits: int, random: RandomStream
    ) -> tuple[torch.Tensor, ...]:
        """Returns numbers, float8_e4m3fn [N, H], and scales, `scale_dtype` [N, blocks]."""
        num_rows, hidden_size = rows.shape
        blocks = pad(rows, (0, -hidden_size % self.block_size)).view(-1, self.block_size)
        scales = self.scales(ops.absmax(blocks))
        # Clamped because a cast beyond the range may give NaN, depending on torch's version.
        units = (blocks.float() / scales.float()[:, None]).clamp(-LARGEST, LARGEST)
        numbers = units.to(torch.float8_e4m3fn).view(num_rows, -1)
        return numbers[:, :hidden_size], scales.view(num_rows, -1)

    def decode_rows(
        self, parts: Sequence[torch.Tensor], num_bits: int, hidden_size: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Returns number * scale."""
        numbers, scales = parts[0].view(torch.float8_e4m3fn), parts[1].view(self.scale_dtype)
        row_scales = scales.float().repeat_interleave(self.block_size, dim=1)[:, :hidden_size]
        return (numbers.float() * row_scales).to(dtype)
