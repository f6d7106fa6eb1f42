"""dithered: rounded like rq, decoded with the sender's random numbers (subtractive dithering)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_moe_comp import ops
from megatron_moe_comp.compression.codec import Codec
from megatron_moe_comp.compression.codecs.op_segments import filled, flat
from megatron_moe_comp.compression.codecs.rq import RandomQuantization
from megatron_moe_comp.compression.payload import Section, Segment
from megatron_moe_comp.compression.random_stream import RandomStream

_RQ = RandomQuantization()


@dataclass(frozen=True)
class Dithered(Codec):
    """E[decoded] = x for every finite x; the error is uniform within half a step D.

    D = 2s / (2^b - 1), s being the largest magnitude of the row. The layout is that of rq with a
    scale per row: b + 32 / H bits per value. The receiver knows the seed, the sender and the number
    of each row, hence the random bits that were added to a value, and subtracts them. The variance
    is D^2 / 12 whatever x is: half of rq's average, and less with few bits, since no level need be
    at zero and so all 2^b codes are in use. In return, a zero arrives as zero only in a row of
    zeros. A row with NaN or infinity anywhere arrives as NaN everywhere; one whose largest
    magnitude is below 2^-100 as zeros.

    Source: Gray and Stockham, "Dithered Quantizers", IEEE Transactions on Information Theory, 1993.
    """

    name: ClassVar[str] = "dithered"
    num_bits_range: ClassVar[tuple[int, int] | None] = _RQ.num_bits_range
    kernels: ClassVar[tuple[str, ...]] = ("quantize_pack", "unpack_dithered")

    def sections(self, hidden_size: int, dtype: torch.dtype, num_bits: int) -> tuple[Section, ...]:
        """Returns the codes and the scales."""
        return _RQ.sections(hidden_size, dtype, num_bits)

    def encode(
        self,
        rows: torch.Tensor,
        segments: Sequence[Segment],
        message: torch.Tensor,
        random: RandomStream,
    ) -> None:
        """Writes codes, ceil(H * b / 8) bytes per row, and scales, float32."""
        ops.quantize_pack(
            rows,
            None,
            message,
            flat(segments),
            key=random.key,
            offset=random.offset,
            stream=random.stream,
            mid_rise=True,
        )

    def decode(
        self,
        message: torch.Tensor,
        segments: Sequence[Segment],
        rows: torch.Tensor,
        random: RandomStream,
    ) -> None:
        """Writes codes less the random bits, times steps."""
        senders = [(s.sender_row, random.of_rank(s.sender).key) for s in filled(segments)]
        ops.unpack_dithered(
            message,
            rows,
            flat(segments),
            [value for sender in senders for value in sender],
            offset=random.offset,
            stream=random.stream,
        )
