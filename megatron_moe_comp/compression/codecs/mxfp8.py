"""mxfp8: E4M3 numbers with a power-of-two scale per 32 values, the MXFP8 of the OCP MX standard."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_moe_comp.compression.codecs.small_float import SmallFloat


@dataclass(frozen=True)
class MxFloat8(SmallFloat):
    """Blocks of 32 values, each with a scale 2^(floor(log2(largest magnitude)) - 8) in one byte.

    8 + 8 / 32 = 8.25 bits per value if H is a multiple of 32. Biased: rounded to nearest, with a
    relative error of at most 1/16 down to 1/16384 of the block's largest magnitude; but a
    block's numbers above 448 scales, up to 512, become 448: up to 1/8 too small. Zeros stay zeros.
    A block with NaN or infinity arrives as NaN (scale byte 255); the row's other blocks do not
    change. A scale is at least 2^-127, so values below 2^-137 arrive as zeros.

    Source: OCP Microscaling Formats (MX) Specification v1.0, section 6.3.
    """

    name: ClassVar[str] = "mxfp8"
