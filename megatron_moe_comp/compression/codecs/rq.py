"""rq: BirdMoE's unbiased random quantization to 2..8 bits, packed densely."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_moe_comp import ops
from megatron_moe_comp.compression.codec import Codec, RowFormat
from megatron_moe_comp.compression.payload import Section, as_bytes, from_bytes
from megatron_moe_comp.compression.random_stream import RandomStream
from megatron_moe_comp.config import ScalePer


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

    def sections(self, row_format: RowFormat) -> tuple[Section, ...]:
        """Returns the codes and the scales."""
        code_bytes = ops.packed_bytes(row_format.hidden_size, row_format.num_bits)
        codes = Section("codes", row_bytes=code_bytes)
        if self.scale_per == "row":
            return codes, Section("scales", row_bytes=4)
        return codes, Section("scales", segment_bytes=4)

    def encode(
        self,
        rows: torch.Tensor,
        segment_rows: Sequence[int],
        row_format: RowFormat,
        random: RandomStream,
    ) -> tuple[torch.Tensor, ...]:
        """Returns codes, uint8 [N, ceil(H * b / 8)], and scales, uint8 [N or segments, 4]."""
        # aminmax keeps NaN; -min and max rather than abs() spare a copy of the rows.
        low, high = rows.aminmax(dim=1) if rows.numel() else (rows.new_empty(0),) * 2
        # Adding zero makes the -0.0 that a row of zeros may give a 0.0 on every device.
        scales = torch.maximum(-low, high).float() + 0.0
        if self.scale_per == "chunk":
            segments = scales.split(list(segment_rows))
            scales = torch.stack([s.max() if s.numel() else s.new_zeros(()) for s in segments])
        # An infinite scale would decode zeros to NaN and everything else to it too: say NaN.
        scales = torch.where(torch.isfinite(scales), scales, torch.nan)
        codes = ops.quantize_pack(
            rows,
            self._per_row(scales, segment_rows),
            row_format.num_bits,
            random.key,
            random.offset,
            random.stream,
        )
        return codes, as_bytes(scales)

    def decode(
        self, parts: Sequence[torch.Tensor], segment_rows: Sequence[int], row_format: RowFormat
    ) -> torch.Tensor:
        """Returns codes times steps."""
        codes, scale_bytes = parts
        scales = from_bytes(scale_bytes, torch.float32).view(-1)
        return ops.unpack_dequantize(
            codes,
            self._per_row(scales, segment_rows),
            row_format.num_bits,
            row_format.hidden_size,
            row_format.dtype,
        )

    def _per_row(self, scales: torch.Tensor, segment_rows: Sequence[int]) -> torch.Tensor:
        if self.scale_per == "row":
            return scales
        repeats = torch.tensor(segment_rows, device=scales.device)
        return scales.repeat_interleave(repeats, output_size=sum(segment_rows))
