"""What a codec is: float rows <-> the byte sections of a message."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_moe_comp.compression.payload import Section
from megatron_moe_comp.compression.random_stream import RandomStream


@dataclass(frozen=True)
class RowFormat:
    """What both ends know of the rows of a message: their width, their dtype, and the bits."""

    hidden_size: int
    dtype: torch.dtype
    num_bits: int
    """Bits per value on the wire; a codec of fixed width does not use it."""


class Codec(ABC):
    """One format of rows on the wire; a pure function of rows, bits and random stream.

    A codec keeps no state and never communicates. Shapes: N rows of all segments together, H
    columns; a segment is the rows that go to one rank.
    """

    name: ClassVar[str]

    @abstractmethod
    def sections(self, row_format: RowFormat) -> tuple[Section, ...]:
        """Returns the sections that `encode` fills, in order."""

    @abstractmethod
    def encode(
        self,
        rows: torch.Tensor,
        segment_rows: Sequence[int],
        row_format: RowFormat,
        random: RandomStream,
    ) -> tuple[torch.Tensor, ...]:
        """Returns one uint8 tensor per section: [N, row_bytes] or [segments, segment_bytes].

        A row with NaN or infinity must not decode to finite values.

        Args:
            rows: [N, H], any floating-point dtype, contiguous.
            segment_rows: rows of each segment; their sum is N.
            row_format: of `rows`.
            random: which random numbers to use.
        """

    @abstractmethod
    def decode(
        self, parts: Sequence[torch.Tensor], segment_rows: Sequence[int], row_format: RowFormat
    ) -> torch.Tensor:
        """Returns the rows, [N, H] in their own dtype, of the tensors that `encode` returned."""
