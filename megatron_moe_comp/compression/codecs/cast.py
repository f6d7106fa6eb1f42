"""bf16 and fp16: rows in a 16-bit floating-point format.

16 bits per value, exact for rows of that dtype, biased only as any rounding to nearest. Finite
values beyond the range of the format, or of the rows' own dtype on arrival, become its largest; NaN
and infinities arrive as they are.
"""

from dataclasses import dataclass
from typing import ClassVar

from megatron_moe_comp.compression.codecs.small_float import SmallFloat


@dataclass(frozen=True)
class BFloat16Cast(SmallFloat):
    """Rows in bfloat16: float32's range, 8 bits of precision; 16 bits per value."""

    name: ClassVar[str] = "bf16"


@dataclass(frozen=True)
class Float16Cast(SmallFloat):
    """Rows in IEEE float16: 11 bits of precision, range 6e-8 to 65504; 16 bits per value."""

    name: ClassVar[str] = "fp16"
