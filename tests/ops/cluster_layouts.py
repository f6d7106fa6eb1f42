"""Layouts of clusters, which the tests of every kernel share."""

import torch
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

COUNTS = st.one_of(
    st.lists(st.integers(0, 7), max_size=12),
    st.lists(st.sampled_from([0, 0, 1, 1, 40]), max_size=8),
)
"""Rows of each cluster."""


def layout(counts, generator=None):
    """Returns order, in which rows of clusters lie anywhere, and offsets."""
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return torch.randperm(int(offsets[-1]), generator=generator), offsets


def random_rows(num_rows, hidden, dtype, generator=None):
    """Returns rows of very different magnitude: another order of additions shows."""
    magnitudes = torch.randn(num_rows, 1, generator=generator, dtype=torch.float64).mul(3).exp()
    values = torch.randn(num_rows, hidden, generator=generator, dtype=torch.float64)
    return (values * magnitudes).to(dtype)


def same_bytes(actual, expected):
    """Returns whether all bits are equal; of NaN, other machines write other bits."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    same = (actual.view(bits) == expected.view(bits)) | (actual.isnan() & expected.isnan())
    return actual.dtype == expected.dtype and actual.shape == expected.shape and bool(same.all())
