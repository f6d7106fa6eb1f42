"""rq: BirdMoE's unbiased random quantization to 2..8 bits, packed densely."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from megatron_moe_comp import ops
from megatron_moe_comp.compression.codec import Codec
from megatron_moe_comp.compression.codecs.op_segments import filled, flat
from megatron_moe_comp.compression.payload import Section, Segment, read_bytes, write_bytes
from megatron_moe_comp.compression.random_stream import RandomStream

ScalePer = Literal["row", "chunk"]


@dataclass(frozen=True)
class RandomQuantization(Codec):
    """RQ of BirdMoE (Wu et al., DAC 2025): E[decoded] = x for every finite x.

    A value is b bits, sign included; its scale, the largest magnitude of the row or of the rows
    for one rank, is a float32. So a row of H values is ceil(H * b / 8) + 4 bytes with a scale per
    row: 6.125 bits per value at H = 256 and b = 6. The variance is at most (s / 2L)^2 with
    L = 2^(b-1) - 1. Zeros stay zeros. A row (with a scale per chunk: a chunk) with NaN or infinity
    anywhere arrives as NaN everywhere; one whose largest magnitude is below 2^-100 as zeros.
    """

    scale_per: ScalePer = "row"
    name: ClassVar[str] = "rq"
    num_bits_range: ClassVar[tuple[int, int] | None] = (2, 8)
    kernels: ClassVar[tuple[str, ...]] = ("quantize_pack", "unpack_dequantize")
    options: ClassVar[tuple[str, ...]] = ("scale_per",)

    def sections(self, hidden_size: int, dtype: torch.dtype, num_bits: int) -> tuple[Section, ...]:
        """Returns the codes and the scales."""
        codes = Section("codes", row_bytes=ops.packed_bytes(hidden_size, num_bits))
        if self.scale_per == "row":
            return codes, Section("scales", row_bytes=4)
        return codes, Section("scales", segment_bytes=4)

    def encode(
        self,
        rows: torch.Tensor,
        segments: Sequence[Segment],
        message: torch.Tensor,
        random: RandomStream,
    ) -> None:
        """Writes codes, ceil(H * b / 8) bytes per row, and scales, float32."""
        row_scales = None
        if self.scale_per == "chunk":
            row_scales = rows.new_zeros(len(rows), dtype=torch.float32)
            for s in filled(segments):
                own = slice(s.first_row, s.first_row + s.num_rows)
                scale = ops.absmax(rows[own]).amax(dim=0, keepdim=True)
                row_scales[own] = scale
                write_bytes(message, s.offsets[1], scale)
        ops.quantize_pack(
            rows,
            row_scales,
            message,
            flat(segments),
            key=random.key,
            offset=random.offset,
            stream=random.stream,
        )

    def decode(
        self,
        message: torch.Tensor,
        segments: Sequence[Segment],
        rows: torch.Tensor,
        random: RandomStream,
    ) -> None:
        """Writes codes times steps."""
        row_scales = None
        if self.scale_per == "chunk":
            row_scales = rows.new_zeros(len(rows), dtype=torch.float32)
            for s in filled(segments):
                scale = read_bytes(message, s.offsets[1], (1,), torch.float32)
                row_scales[s.first_row : s.first_row + s.num_rows] = scale
        ops.unpack_dequantize(message, row_scales, rows, flat(segments))
