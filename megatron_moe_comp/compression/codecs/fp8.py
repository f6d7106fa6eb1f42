"""fp8: E4M3 numbers with a float32 scale per 128 values, as DeepEP's dispatch sends."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_moe_comp.compression.codecs.small_float import SmallFloat


@dataclass(frozen=True)
class Float8(SmallFloat):
    """Blocks of 128 values scaled so that the largest magnitude is 448, E4M3's largest number.

    8 + 32 / 128 = 8.25 bits per value if H is a multiple of 128. Biased: rounded to nearest, with
    a relative error of at most 1/16 for magnitudes down to 1/28672 of the block's largest, smaller
    ones to multiples of 1/229376 of it. Zeros stay zeros. A block with NaN or infinity arrives as
    NaN, one whose largest magnitude is below 2^-100 as zeros; the row's other blocks do not change.

    Source: the format of DeepEP's FP8 dispatch (github.com/deepseek-ai/DeepEP), without its
    smallest scale of 1e-4 / 448, which would erase small gradients.
    """

    name: ClassVar[str] = "fp8"
