"""unpack_dithered and gaussian_*: the C++ kernels against the references, byte for byte."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_comp import ops
from megatron_moe_comp.ops.gaussian import CELLS, THRESHOLDS, _pack_reference, _unpack_reference
from megatron_moe_comp.ops.unpack_dithered import _reference
from tests.ops.low_bit_layouts import assert_same_rows, layout, special_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HIDDEN = (1, 37, 64, 136, 1056)
WORDS = st.integers(0, 2**32 - 1)
RANDOM = {"offset": 0xFFFFFFFF, "stream": 0x80000001}
KEY = -0x123456789ABCDEF

if not ops.is_compiled("cpu", "gaussian_pack"):
    pytest.skip("the C++ kernels are not built: run scripts/setup.sh", allow_module_level=True)


def reference_unpack_dithered(*args, offset, stream):
    _reference(*args, offset, stream)


def assert_dithered(message, rows, segments, senders):
    expected, decoded = torch.full_like(rows, -7.0), torch.full_like(rows, -7.0)
    reference_unpack_dithered(message, expected, segments, senders, **RANDOM)
    ops.unpack_dithered(message, decoded, segments, senders, **RANDOM)
    assert_same_rows(decoded, expected)


def assert_gaussian_decoding(message, rows, segments):
    expected, decoded = torch.full_like(rows, -7.0), torch.full_like(rows, -7.0)
    _unpack_reference(message, expected, segments)
    ops.gaussian_unpack(message, decoded, segments)
    assert_same_rows(decoded, expected)


def assert_gaussian(rows, segments, num_bytes):
    expected, message = (torch.full((num_bytes,), 0xFF, dtype=torch.uint8) for _ in range(2))
    _pack_reference(rows, expected, segments)
    ops.gaussian_pack(rows, message, segments)
    wrong = (message != expected).nonzero().flatten()
    assert not len(wrong), f"{len(wrong)} of {num_bytes} bytes, the first at {int(wrong[0])}"
    assert_gaussian_decoding(message, rows, segments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_bits", [2, 3, 4, 7])
def test_special_rows(isa, num_bits, dtype):
    for hidden in HIDDEN:
        rows = special_rows(hidden, dtype)
        segments, _, num_bytes = layout(hidden, [(len(rows), num_bits)])
        message = torch.full((num_bytes,), 0xFF, dtype=torch.uint8)
        ops.quantize_pack(rows, None, message, segments, key=KEY, **RANDOM, mid_rise=True)
        assert_dithered(message, rows, segments, [0, KEY])
        if num_bits <= 4:
            segments, _, num_bytes = layout(hidden, [(len(rows), num_bits)], scale_bytes=2)
            assert_gaussian(rows, segments, num_bytes)


@given(
    hidden=st.integers(1, 300),
    sizes=st.lists(st.tuples(st.integers(0, 5), st.integers(2, 8)), max_size=5),
    gaps=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    senders=st.lists(
        st.tuples(st.integers(0, 2**32 - 5), st.integers(-(2**63), 2**63 - 1)),
        min_size=5,
        max_size=5,
    ),
    dtype=st.sampled_from(DTYPES),
    seed=WORDS,
)
@settings(max_examples=50, deadline=None)
def test_mixed_segments_with_gaps(isa, hidden, sizes, gaps, senders, dtype, seed):
    """Bytes and rows between the segments stay as they were, too."""
    generator = torch.Generator().manual_seed(seed)
    senders = [value for sender in senders[: len(sizes)] for value in sender]
    segments, num_rows, num_bytes = layout(hidden, sizes, gaps)
    rows = torch.randn(num_rows, hidden, generator=generator)
    message = torch.randint(0, 256, (num_bytes,), generator=generator, dtype=torch.uint8)
    ops.quantize_pack(rows, None, message, segments, key=seed, **RANDOM, mid_rise=True)
    assert_dithered(message, rows.to(dtype), segments, senders)
    sizes = [(num_rows, 2 + num_bits % 3) for num_rows, num_bits in sizes]
    segments, num_rows, num_bytes = layout(hidden, sizes, gaps, scale_bytes=2)
    magnitudes = torch.rand(num_rows, 1, generator=generator).mul(8).exp()
    rows = torch.randn(num_rows, hidden, generator=generator) * magnitudes
    assert_gaussian(rows.to(dtype), segments, num_bytes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_bits", range(2, 9))
def test_decoding_of_any_bytes(isa, num_bits, dtype):
    """Scales of every bit pattern."""
    generator = torch.Generator().manual_seed(num_bits)
    for hidden in (13, 200):
        rows = torch.empty(100, hidden, dtype=dtype)
        segments, _, num_bytes = layout(hidden, [(100, num_bits)])
        message = torch.randint(0, 256, (num_bytes,), generator=generator, dtype=torch.uint8)
        assert_dithered(message, rows, segments, [7, KEY])
        if num_bits <= 4:
            assert_gaussian_decoding(message, rows, segments)


@pytest.mark.parametrize("num_bits", THRESHOLDS)
def test_values_at_the_edge_of_a_level(isa, num_bits):
    """The float32 next to a threshold on either side, of both signs, and whole cells."""
    edges = torch.tensor([*THRESHOLDS[num_bits], 0, 1, 126, 127, 128, 129, 500]) / CELLS
    around = torch.cat([edges, *(edges.nextafter(torch.tensor(s)) for s in (-9.0, 9.0))])
    pattern = torch.cat((around, -around))
    rows = torch.zeros(40, 4 * len(pattern))
    rows[:, : len(pattern)] = pattern
    # Fills the row up to a root mean square of about 1, then of other sizes.
    left = rows.shape[1] - len(pattern)
    rows[:, len(pattern) :] = ((rows.shape[1] - pattern.square().sum()).clamp(min=9) / left).sqrt()
    rows *= 2.0 ** torch.arange(-20, 20)[:, None]
    segments, _, num_bytes = layout(rows.shape[1], [(len(rows), num_bits)], scale_bytes=2)
    assert_gaussian(rows, segments, num_bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bytes(isa, dtype):
    sizes = [(1, 2), (700, 4), (0, 3), (30, 3)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        segments, num_rows, num_bytes = layout(256, sizes, [1], scale_bytes=2)
        assert_gaussian(torch.randn(num_rows, 256).to(dtype), segments, num_bytes)
        segments, num_rows, num_bytes = layout(256, sizes, [1])
        message = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
        rows = torch.empty(num_rows, 256, dtype=dtype)
        assert_dithered(message, rows, segments, [0, 1, 2, 3, 4, 5, 6, 7])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("scale_bytes", [2, 4])
def test_decoding_to_more_than_the_caches_hold(isa, scale_bytes):
    """From 48 MiB on, the stores may bypass the caches."""
    segments, num_rows, num_bytes = layout(4096, [(3072, 3)], scale_bytes=scale_bytes)
    message = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
    *_, codes, scales = segments
    rows = torch.empty(num_rows, 4096)

    def decode(first, num_rows, rows):
        part = [first, num_rows, 3, codes + first * 1536, scales + first * scale_bytes]
        if scale_bytes == 4:
            ops.unpack_dithered(message, rows, part, [first, KEY], **RANDOM)
        else:
            ops.gaussian_unpack(message, rows, part)

    decode(0, 3072, rows)
    for first in (0, 3040):
        expected = torch.empty_like(rows)
        decode(first, 32, expected)
        assert_same_rows(rows[first : first + 32], expected[first : first + 32])
