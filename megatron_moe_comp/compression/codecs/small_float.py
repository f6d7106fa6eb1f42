"""What bf16, fp16, fp8 and mxfp8 share: small floating-point numbers, with scales or without."""

from collections.abc import Sequence
from typing import ClassVar

import torch

from megatron_moe_comp import ops
from megatron_moe_comp.compression.codec import Codec
from megatron_moe_comp.compression.payload import Section, Segment
from megatron_moe_comp.compression.random_stream import RandomStream


class SmallFloat(Codec):
    """Rows in the format of `ops.CAST_FORMATS` that has the codec's name, rounded to nearest."""

    kernels: ClassVar[tuple[str, ...]] = ("cast_pack", "unpack_cast")

    def sections(self, hidden_size: int, dtype: torch.dtype, num_bits: int) -> tuple[Section, ...]:
        """Returns the numbers and, if the format has them, the scales."""
        form = ops.CAST_FORMATS[self.name]
        numbers = Section("numbers", row_bytes=hidden_size * form.dtype.itemsize)
        if not form.block_size:
            return (numbers,)
        return numbers, Section("scales", row_bytes=form.row_scale_bytes(hidden_size))

    def encode(
        self,
        rows: torch.Tensor,
        segments: Sequence[Segment],
        message: torch.Tensor,
        random: RandomStream,
    ) -> None:
        """Writes the numbers and, if the format has them, the scales."""
        ops.cast_pack(rows, message, self._flat(segments), self.name)

    def decode(
        self,
        message: torch.Tensor,
        segments: Sequence[Segment],
        rows: torch.Tensor,
        random: RandomStream,
    ) -> None:
        """Writes the numbers, times their scales if the format has them."""
        ops.unpack_cast(message, rows, self._flat(segments), self.name)

    def _flat(self, segments: Sequence[Segment]) -> list[int]:
        num_bits = ops.CAST_FORMATS[self.name].num_bits
        return ops.flatten(
            [
                ops.OpSegment(s.first_row, s.num_rows, num_bits, s.offsets[0], s.offsets[-1])
                for s in segments
            ]
        )
