"""gaussian: the best levels for normal values, to 2, 3 or 4 bits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_moe_comp import ops
from megatron_moe_comp.compression.codec import Codec
from megatron_moe_comp.compression.codecs.op_segments import flat
from megatron_moe_comp.compression.payload import Section, Segment
from megatron_moe_comp.compression.random_stream import RandomStream


@dataclass(frozen=True)
class Gaussian(Codec):
    """Each value becomes one of 2^b levels, by the nearest of Lloyd-Max's for normal values.

    The levels are multiples of the row's root mean square, which is sent as a bfloat16: b + 16 / H
    bits per value, 3.0625 at H = 256 and b = 3. Of all codecs of a width it has the least error
    where a row's values are about normal. Lloyd-Max's levels are stretched by 1 / (1 - D), D being
    their mean square error, so that the error of such a row is uncorrelated with the row, which
    does not get shorter: 0.5, 0.15 or 0.04 dB at 2, 3 or 4 bits are the price. Biased: a value
    always becomes the same level, and one beyond the outermost (1.7, 2.2 or 2.8 root mean squares)
    is cut to it, so an outlier does not arrive; and a zero arrives as zero only in a row of zeros.
    A row with NaN or infinity anywhere arrives as NaN everywhere; one whose root mean
    square is below 2^-100 as zeros.

    Source: Lloyd, "Least Squares Quantization in PCM", 1957; Max, "Quantizing for Minimum
    Distortion", IRE Transactions on Information Theory, 1960.
    """

    name: ClassVar[str] = "gaussian"
    num_bits_range: ClassVar[tuple[int, int] | None] = (2, 4)
    kernels: ClassVar[tuple[str, ...]] = ("gaussian_pack", "gaussian_unpack")

    def sections(self, hidden_size: int, dtype: torch.dtype, num_bits: int) -> tuple[Section, ...]:
        """Returns the codes and the scales."""
        codes = Section("codes", row_bytes=ops.packed_bytes(hidden_size, num_bits))
        return codes, Section("scales", row_bytes=2)

    def encode(
        self,
        rows: torch.Tensor,
        segments: Sequence[Segment],
        message: torch.Tensor,
        random: RandomStream,
    ) -> None:
        """Writes codes, ceil(H * b / 8) bytes per row, and scales, bfloat16."""
        ops.gaussian_pack(rows, message, flat(segments))

    def decode(
        self,
        message: torch.Tensor,
        segments: Sequence[Segment],
        rows: torch.Tensor,
        random: RandomStream,
    ) -> None:
        """Writes levels times scales."""
        ops.gaussian_unpack(message, rows, flat(segments))
