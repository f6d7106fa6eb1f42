"""identity: rows as they are, for the wires that are not compressed."""

from collections.abc import Sequence
from typing import ClassVar

import torch

from megatron_moe_comp.compression.codec import Codec, RowFormat
from megatron_moe_comp.compression.payload import Section, as_bytes, from_bytes
from megatron_moe_comp.compression.random_stream import RandomStream


class Identity(Codec):
    """Sends rows in their own dtype, bit for bit, whatever bits and random stream."""

    name: ClassVar[str] = "identity"

    def sections(self, row_format: RowFormat) -> tuple[Section, ...]:
        """Returns one section, the rows."""
        return (Section("rows", row_bytes=row_format.hidden_size * row_format.dtype.itemsize),)

    def encode(
        self,
        rows: torch.Tensor,
        segment_rows: Sequence[int],
        row_format: RowFormat,
        random: RandomStream,
    ) -> tuple[torch.Tensor, ...]:
        """Returns the rows' own bytes."""
        return (as_bytes(rows),)

    def decode(
        self, parts: Sequence[torch.Tensor], segment_rows: Sequence[int], row_format: RowFormat
    ) -> torch.Tensor:
        """Returns the rows of these bytes."""
        return from_bytes(parts[0], row_format.dtype).view(-1, row_format.hidden_size)
