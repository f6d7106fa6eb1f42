"""lq: linear quantization of all rows for one rank between their smallest and largest value."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_moe_comp.compression.codecs.affine import Affine
from megatron_moe_comp.compression.payload import Section


@dataclass(frozen=True)
class LinearQuantization(Affine):
    """LQ, a baseline of BirdMoE (Wu et al., DAC 2025): min/max of a whole tensor, nearest level.

    A value is b bits, and the rows for one rank share two float32: at H = 256 and 100 rows,
    b + 0.0025 bits per value. Biased: a value always rounds the same way, at most half a step off,
    the step being (largest - smallest) / (2^b - 1) of all rows for the rank; so one outlier spoils
    them all. Zero is no level in general: values of zero arrive as the level next to it, unless
    all are equal. Any NaN or infinity makes all rows for the rank arrive as NaN.
    """

    name: ClassVar[str] = "lq"
    range_section: ClassVar[Section] = Section("range", segment_bytes=8)

    def ranges(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the ends of the range of all rows."""
        low, high = rows.aminmax()
        return low.view(1, 1), high.view(1, 1)
