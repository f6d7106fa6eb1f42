"""terngrad: each value zero or plus or minus the row's largest, unbiased, five to a byte."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import pad

from megatron_moe_comp import ops
from megatron_moe_comp.compression.codec import TensorCodec
from megatron_moe_comp.compression.codecs.scaling import normalized
from megatron_moe_comp.compression.payload import Section
from megatron_moe_comp.compression.random_stream import RandomStream
from megatron_moe_comp.ops.philox import random_halves

_TRITS_PER_BYTE = 5
"""3^5 = 243 fit a byte."""


def pack_trits(trits: torch.Tensor) -> torch.Tensor:
    """Returns the trits as base-3 numbers, the first the lowest digit, uint8 [N, ceil(H / 5)].

    For example, trits 1 0 2 0 0 1 are the bytes 19 (1 + 2 * 9) and 1.

    Args:
        trits: uint8 [N, H], below 3.
    """
    digits = pad(trits, (0, -trits.shape[1] % _TRITS_PER_BYTE))
    digits = digits.unflatten(1, (-1, _TRITS_PER_BYTE))
    return (digits * _weights(trits.device)).sum(dim=-1, dtype=torch.uint8)


def unpack_trits(packed: torch.Tensor, num_values: int) -> torch.Tensor:
    """Returns the trits of base-3 numbers, uint8 [N, num_values].

    Args:
        packed: uint8 [N, ceil(num_values / 5)].
        num_values: trits in a row.
    """
    digits = packed[..., None] // _weights(packed.device) % 3
    return digits.flatten(1)[:, :num_values]


def _weights(device: torch.device) -> torch.Tensor:
    return 3 ** torch.arange(_TRITS_PER_BYTE, dtype=torch.uint8, device=device)


@dataclass(frozen=True)
class TernGrad(TensorCodec):
    """Values in {-s, 0, s}, s the row's largest magnitude; x becomes sign(x) s with P = |x| / s.

    1.6 + 32 / H bits per value (ceil(H / 5) + 4 bytes per row): 1.75 at H = 256. Unbiased up to
    s * 2^-17, the resolution of the 16 random bits per value; the variance is |x| (s - |x|), so an
    outlier makes its row noisy. Zeros stay zeros. A row with NaN or infinity anywhere arrives as
    NaN everywhere.

    Source: Wen et al., "TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep
    Learning", NeurIPS 2017, with one scale per row and without its clipping, which is biased.
    """

    name: ClassVar[str] = "terngrad"

    def sections(self, hidden_size: int, dtype: torch.dtype, num_bits: int) -> tuple[Section, ...]:
        """Returns the trits and the scales."""
        trits = Section("trits", row_bytes=-(-hidden_size // _TRITS_PER_BYTE))
        return trits, Section("scales", row_bytes=4)

    def encode_rows(
        self, rows: torch.Tensor, row_numbers: torch.Tensor, num_bits: int, random: RandomStream
    ) -> tuple[torch.Tensor, ...]:
        """Returns trits, packed, 1 standing for zero, and scales, float32 [N, 1]."""
        hidden_size = rows.shape[1]
        scales = ops.absmax(rows)[:, None]
        units = normalized(rows, scales)
        halves = random_halves(
            row_numbers,
            -(-hidden_size // 8),
            key=random.key,
            offset=random.offset,
            stream=random.stream,
        ).flatten(1)[:, :hidden_size]
        is_kept = halves < (units.abs() * 65536).round()
        trits = torch.where(is_kept, units.sign(), 0.0) + 1
        return pack_trits(trits.to(torch.uint8)), scales

    def decode_rows(
        self, parts: Sequence[torch.Tensor], num_bits: int, hidden_size: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Returns sign * scale."""
        signs = unpack_trits(parts[0], hidden_size).float() - 1
        return (signs * parts[1].view(torch.float32)).to(dtype)
