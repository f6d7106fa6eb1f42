import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_comp.compression.payload import (
    ALIGNMENT,
    PayloadLayout,
    Section,
    as_bytes,
    from_bytes,
)

section_sizes = st.lists(st.tuples(st.booleans(), st.integers(1, 37)), min_size=1, max_size=4)


def make_parts(sections, segment_rows, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (sum(segment_rows), s.row_bytes) if s.row_bytes else (len(segment_rows), s.segment_bytes)
        for s in sections
    ]
    return [torch.randint(0, 256, s, generator=generator, dtype=torch.uint8) for s in shapes]


@given(
    sizes=section_sizes,
    segment_rows=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=200, deadline=None)
def test_unpack_inverts_pack(sizes, segment_rows, seed):
    sections = tuple(
        Section(str(i), row_bytes=size) if per_row else Section(str(i), segment_bytes=size)
        for i, (per_row, size) in enumerate(sizes)
    )
    layout = PayloadLayout(sections, tuple(segment_rows))
    parts = make_parts(sections, segment_rows, seed)
    buffer = layout.pack(parts)
    splits = layout.byte_splits()
    assert buffer.numel() == sum(splits)
    assert all(split % ALIGNMENT == 0 for split in splits)
    assert all(split == 0 for split, rows in zip(splits, segment_rows, strict=True) if not rows)
    for section, part, found in zip(sections, parts, layout.unpack(buffer), strict=True):
        if section.segment_bytes:  # a rank without rows is sent nothing, so it gets zeros
            part[[rows == 0 for rows in segment_rows]] = 0
        assert torch.equal(part, found)


@given(
    segment_rows=st.lists(st.integers(0, 5), min_size=2, max_size=4), row_bytes=st.integers(1, 20)
)
@settings(max_examples=50, deadline=None)
def test_a_segment_stands_alone(segment_rows, row_bytes):
    """The receiver decodes one sender's segment without knowing what others were sent."""
    sections = (Section("codes", row_bytes=row_bytes), Section("scales", row_bytes=4))
    parts = make_parts(sections, segment_rows, 0)
    layout = PayloadLayout(sections, tuple(segment_rows))
    segments = layout.pack(parts).split(layout.byte_splits())
    first = 0
    for rows, segment in zip(segment_rows, segments, strict=True):
        alone = PayloadLayout(sections, (rows,)).unpack(segment)
        for part, found in zip(parts, alone, strict=True):
            assert torch.equal(part[first : first + rows], found)
        first += rows


def test_padding_is_zero():
    layout = PayloadLayout((Section("codes", row_bytes=3),), (1, 0, 2))
    poisoned = torch.full((3, 3), 255, dtype=torch.uint8)
    buffer = layout.pack([poisoned])
    assert layout.byte_splits() == [16, 0, 16]
    assert buffer.tolist() == [255] * 3 + [0] * 13 + [255] * 6 + [0] * 10


def test_bytes_round_trip_at_any_offset():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        values = torch.randn(3, 5).to(dtype)
        octets = as_bytes(values)
        assert octets.shape == (3, 5 * dtype.itemsize)
        misaligned = torch.cat((octets.new_zeros(1), octets.flatten()))[1:].view(octets.shape)
        assert torch.equal(from_bytes(misaligned, dtype), values)
    assert as_bytes(torch.empty(0, 7)).shape == (0, 28)
    assert as_bytes(torch.empty(0)).shape == (0, 4)
    assert as_bytes(torch.randn(6, 4).t()).shape == (4, 24)
