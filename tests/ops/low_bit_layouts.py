"""Rows, messages and segments that the kernels of unpack_dithered and gaussian_* are tested on."""

import torch

from megatron_moe_comp import ops
from megatron_moe_comp.ops.quantize_pack import packed_bytes


def special_rows(hidden, dtype):
    """One row of each kind that takes a path of its own."""
    noise = torch.randn(4, hidden, generator=torch.Generator().manual_seed(hidden))
    constants = (0.0, -0.0, 2.0, -0.3, 1e-40, 2.0**-100, 2.0**-101, 1e38, -3.3e38, 1 / 3, 65504.0)
    rows = [*noise, noise[0] * 1e-20, noise[0] * 1e30, -noise[1].abs()]
    rows += [torch.full((hidden,), value) for value in constants]
    for value in (float("nan"), -float("nan"), float("inf"), -float("inf"), 1e4, -1e-30):
        row = noise[1].clone()
        row[hidden // 2] = value
        rows.append(row)
    return torch.stack(rows).to(dtype)


def layout(hidden, sizes, gaps=(0,), scale_bytes=4):
    """Returns segments, each behind a gap of rows and bytes, the number of rows and of bytes."""
    segments, row, byte = [], 0, 0
    for i, (num_rows, num_bits) in enumerate(sizes):
        gap = gaps[i % len(gaps)]
        row, codes = row + gap, byte + gap
        scales = codes + num_rows * packed_bytes(hidden, num_bits) + gap
        segments.append(ops.OpSegment(row, num_rows, num_bits, codes, scales))
        row, byte = row + num_rows, scales + scale_bytes * num_rows
    return ops.flatten(segments), row + 1, byte + 5


def assert_same_rows(decoded, expected):
    """Equal bits; of NaN, torch itself writes other bits on other machines."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    same = decoded.view(bits) == expected.view(bits)
    wrong = (~(same | decoded.isnan() & expected.isnan())).nonzero()
    assert not len(wrong), f"{len(wrong)} values, the first at {wrong[0].tolist()}"
