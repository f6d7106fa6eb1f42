"""shapeshifter: linear quantization of each row between its smallest and largest value."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_moe_comp.compression.codecs.affine import Affine
from megatron_moe_comp.compression.payload import Section


@dataclass(frozen=True)
class Shapeshifter(Affine):
    """BirdMoE's baseline of that name: an affine quantizer fitted to each row, nearest level.

    A value is b bits and a row adds two float32, its smallest value (the zero point) and its
    largest (which is the scale times 2^b - 1 above): b + 64 / H bits per value, 6.25 at H = 256
    and b = 6. Biased: a value always rounds the same way, at most half of the row's step off, so an
    outlier costs its own row precision. Zero is no level in general, but a row of equal values
    arrives exactly. A row with NaN or infinity anywhere arrives as NaN everywhere.

    Source: the idea of fitting the code to small groups of values is ShapeShifter's (Delmás Lascorz
    et al., MICRO 2019), which varies the bits of a group; here the bits are given and the range is
    fitted.
    """

    name: ClassVar[str] = "shapeshifter"
    range_section: ClassVar[Section] = Section("ranges", row_bytes=8)

    def ranges(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the ends of each row's range."""
        low, high = rows.aminmax(dim=1, keepdim=True)
        return low, high
