"""identity: rows as they are, for the wires that are not compressed."""

from collections.abc import Sequence
from typing import ClassVar

import torch

from megatron_moe_comp.compression.codec import Codec
from megatron_moe_comp.compression.payload import Section, as_bytes, from_bytes
from megatron_moe_comp.compression.random_stream import RandomStream


class Identity(Codec):
    """Sends rows in their own dtype, bit for bit; `num_bits` and `random` are not used."""

    name: ClassVar[str] = "identity"

    def sections(self, hidden_size: int, dtype: torch.dtype, num_bits: int) -> tuple[Section, ...]:
        """Returns one section, the rows."""
        return (Section("rows", row_bytes=hidden_size * dtype.itemsize),)

    def encode(
        self, rows: torch.Tensor, segment_rows: Sequence[int], num_bits: int, random: RandomStream
    ) -> tuple[torch.Tensor, ...]:
        """Returns the rows' own bytes."""
        return (as_bytes(rows),)

    def decode(
        self,
        parts: Sequence[torch.Tensor],
        segment_rows: Sequence[int],
        num_bits: int,
        hidden_size: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Returns the rows of these bytes."""
        return from_bytes(parts[0], dtype).view(-1, hidden_size)
