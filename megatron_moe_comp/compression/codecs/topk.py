"""topk: the values of largest magnitude of each row and where they are; the rest become zeros."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_moe_comp import ops
from megatron_moe_comp.compression.codec import TensorCodec
from megatron_moe_comp.compression.payload import Section
from megatron_moe_comp.compression.random_stream import RandomStream
from megatron_moe_comp.ops.cast_pack import saturated

_ENTRY_BITS = 32
_MAX_COLUMNS = 1 << 16


@dataclass(frozen=True)
class TopK(TensorCodec):
    """Magnitude top-k within a budget of b bits per value of the row, everything included.

    A row is k = max(1, floor(H * b / 32)) entries of a 16-bit value and a 16-bit column: at b = 6,
    18.75% of the values arrive. Values are float16 in float16 rows and bfloat16 in others, so those
    of 16-bit rows arrive exactly. Among equal magnitudes the lower column is sent. Biased: all
    other values arrive as zeros; an outlier harms no other value. A row with NaN or infinity
    anywhere arrives as NaN everywhere.

    Source: the magnitude sparsification of Aji and Heafield, "Sparse Communication for Distributed
    Gradient Descent", EMNLP 2017, per row and without its residuals.
    """

    name: ClassVar[str] = "topk"
    num_bits_range: ClassVar[tuple[int, int] | None] = (2, 8)

    def sections(self, hidden_size: int, dtype: torch.dtype, num_bits: int) -> tuple[Section, ...]:
        """Returns the values and the columns.

        Raises:
            ValueError: if a column number does not fit 16 bits.
        """
        if hidden_size > _MAX_COLUMNS:
            raise ValueError(
                f"--hidden-size={hidden_size}: topk sends column numbers of 16 bits, so rows have "
                f"at most {_MAX_COLUMNS} values. Choose another codec."
            )
        row_bytes = 2 * _num_entries(hidden_size, num_bits)
        return Section("values", row_bytes=row_bytes), Section("columns", row_bytes=row_bytes)

    def encode_rows(
        self, rows: torch.Tensor, row_numbers: torch.Tensor, num_bits: int, random: RandomStream
    ) -> tuple[torch.Tensor, ...]:
        """Returns values [N, k] and columns, uint16 [N, k], by descending magnitude."""
        # torch.topk does not say which of equal magnitudes it takes.
        order = rows.abs().sort(dim=1, descending=True, stable=True).indices
        columns = order[:, : _num_entries(rows.shape[1], num_bits)]
        values = saturated(rows.gather(1, columns), _value_dtype(rows.dtype))
        values = torch.where(ops.absmax(rows).isnan()[:, None], torch.nan, values)
        return values, columns.to(torch.uint16)

    def decode_rows(
        self, parts: Sequence[torch.Tensor], num_bits: int, hidden_size: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Returns the values in their columns, zeros elsewhere."""
        values = parts[0].view(_value_dtype(dtype)).to(dtype)
        columns = parts[1].view(torch.uint16).long()
        # The background of a row that holds NaN is NaN.
        background = torch.where(values[:, :1].isnan(), torch.nan, torch.zeros_like(values[:, :1]))
        return background.repeat(1, hidden_size).scatter_(1, columns, values)


def _num_entries(hidden_size: int, num_bits: int) -> int:
    return max(1, hidden_size * num_bits // _ENTRY_BITS)


def _value_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float16 if dtype == torch.float16 else torch.bfloat16
