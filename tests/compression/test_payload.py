import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_comp.compression.payload import (
    ALIGNMENT,
    PayloadLayout,
    Section,
    as_bytes,
    read_bytes,
    write_bytes,
)

DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.float64)


@st.composite
def layouts(draw):
    num_sections = draw(st.integers(0, 4))
    sizes = st.tuples(*(st.integers(0, 70) for _ in range(num_sections)))
    sizes = draw(st.lists(sizes, min_size=1, max_size=6))
    return sizes, PayloadLayout(sizes)


@given(layouts())
@settings(max_examples=200, deadline=None)
def test_sections_are_aligned_apart_and_inside(drawn):
    all_sizes, layout = drawn
    splits = layout.byte_splits
    assert len(splits) == len(layout.offsets) == len(all_sizes)
    owner = [None] * sum(splits)
    start = 0
    for rank, (split, sizes) in enumerate(zip(splits, all_sizes, strict=True)):
        assert split % ALIGNMENT == 0
        assert split - sum(sizes) < ALIGNMENT * max(1, len(sizes))
        assert (split == 0) == (not any(sizes))
        for offset, size in zip(layout.offsets[rank], sizes, strict=True):
            assert offset % ALIGNMENT == 0
            assert start <= offset
            assert offset + size <= start + split
            for i in range(offset, offset + size):
                assert owner[i] is None
                owner[i] = rank
        start += split


@given(layouts())
@settings(max_examples=50, deadline=None)
def test_a_segment_stands_alone(drawn):
    """The receiver decodes one sender's segment without knowing what others were sent."""
    all_sizes, layout = drawn
    start = 0
    for split, sizes, offsets in zip(layout.byte_splits, all_sizes, layout.offsets, strict=True):
        alone = PayloadLayout((sizes,))
        assert alone.byte_splits == [split]
        assert alone.offsets[0] == [offset - start for offset in offsets]
        start += split


@pytest.mark.parametrize("num_rows", [0, 1, 7])
def test_section_size(num_rows):
    assert Section("codes", row_bytes=3).size(num_rows) == 3 * num_rows
    assert Section("scale", segment_bytes=4).size(num_rows) == (4 if num_rows else 0)


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    offset=st.integers(0, 9),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=100, deadline=None)
def test_bytes_round_trip_at_any_offset(dtype, shape, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 200, shape, generator=generator).to(dtype)
    size = math.prod(shape) * dtype.itemsize
    message = torch.full((offset + size + 5,), 0xFF, dtype=torch.uint8)
    write_bytes(message, offset, values)
    assert (message[:offset] == 0xFF).all()
    assert (message[offset + size :] == 0xFF).all()
    found = read_bytes(message, offset, shape, dtype)
    assert torch.equal(found, values)
    message.zero_()
    assert torch.equal(found, values)  # a copy


def test_as_bytes_has_a_row_for_each_row():
    values = torch.randn(3, 5)
    assert as_bytes(values).shape == (3, 20)
    assert as_bytes(values)[1].numpy().tobytes() == values[1].numpy().tobytes()
    assert as_bytes(torch.empty(0, 7)).shape == (0, 28)
    assert as_bytes(torch.empty(0)).shape == (0, 4)
    assert as_bytes(torch.randn(6)).shape == (6, 4)
    assert as_bytes(torch.randn(6, 4).t()).shape == (4, 24)
    assert as_bytes(torch.empty(2, 3, 4, dtype=torch.bfloat16)).shape == (2, 24)
