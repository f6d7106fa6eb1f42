"""identity: rows as they are, for the wires and links that are not compressed."""

from collections.abc import Sequence
from typing import ClassVar

import torch

from megatron_moe_comp.compression.codec import Codec
from megatron_moe_comp.compression.payload import Section, Segment, read_bytes, write_bytes
from megatron_moe_comp.compression.random_stream import RandomStream


class Identity(Codec):
    """Sends rows in their own dtype, bit for bit, whatever bits and random stream."""

    name: ClassVar[str] = "identity"

    def sections(self, hidden_size: int, dtype: torch.dtype, num_bits: int) -> tuple[Section, ...]:
        """Returns one section, the rows."""
        return (Section("rows", row_bytes=hidden_size * dtype.itemsize),)

    def encode(
        self,
        rows: torch.Tensor,
        segments: Sequence[Segment],
        message: torch.Tensor,
        random: RandomStream,
    ) -> None:
        """Copies the rows' own bytes."""
        for s in segments:
            write_bytes(message, s.offsets[0], rows[s.first_row : s.first_row + s.num_rows])

    def decode(
        self,
        message: torch.Tensor,
        segments: Sequence[Segment],
        rows: torch.Tensor,
        random: RandomStream,
    ) -> None:
        """Copies the bytes back."""
        for s in segments:
            rows[s.first_row : s.first_row + s.num_rows] = read_bytes(
                message, s.offsets[0], (s.num_rows, rows.shape[1]), rows.dtype
            )
