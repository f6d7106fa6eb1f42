"""The C++ kernels against the references in Python, byte for byte, with every instruction set."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_comp import ops
from megatron_moe_comp.ops.philox import random_halves
from megatron_moe_comp.ops.quantize_pack import _reference as quantize_pack_reference
from megatron_moe_comp.ops.quantize_pack import absmax, levels, packed_bytes, top_level
from megatron_moe_comp.ops.unpack_dequantize import _reference as unpack_dequantize_reference

ISA_VARIABLE = "MEGATRON_MOE_COMP_CPU_ISA"
BITS = range(2, 9)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RANDOM = {"key": -0x123456789ABCDEF, "offset": 0xFFFFFFFF, "stream": 0x80000001}
WORDS = st.integers(0, 2**32 - 1)

if not ops.is_compiled("cpu"):
    pytest.skip("the C++ kernels are not built: run scripts/setup.sh", allow_module_level=True)


def reference(*args, key, offset, stream, mid_rise=False):
    quantize_pack_reference(*args, key, offset, stream, mid_rise)


def encode(kernel, rows, row_scales, segments, num_bytes, **random):
    message = torch.full((num_bytes,), 0xFF, dtype=torch.uint8)
    kernel(rows, row_scales, message, segments, **RANDOM | random)
    return message


def decode(kernel, message, row_scales, rows, segments):
    rows = torch.full_like(rows, -7.0)
    kernel(message, row_scales, rows, segments)
    return rows


def assert_same_encoding(rows, row_scales, segments, num_bytes, **random):
    expected = encode(reference, rows, row_scales, segments, num_bytes, **random)
    message = encode(ops.quantize_pack, rows, row_scales, segments, num_bytes, **random)
    wrong = (message != expected).nonzero().flatten()
    assert not len(wrong), f"{len(wrong)} of {num_bytes} bytes, the first at {int(wrong[0])}"
    return message


def assert_same_decoding(message, row_scales, rows, segments):
    """Equal bits; of NaN, torch itself writes other bits on other machines."""
    expected = decode(unpack_dequantize_reference, message, row_scales, rows, segments)
    decoded = decode(ops.unpack_dequantize, message, row_scales, rows, segments)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    same = (decoded.view(bits) == expected.view(bits)) | (decoded.isnan() & expected.isnan())
    wrong = (~same).nonzero()
    assert not len(wrong), f"{len(wrong)} values, the first at {wrong[0].tolist()}"


def special_rows(hidden, dtype):
    """One row of each kind that takes a path of its own, or that has gone wrong somewhere."""
    noise = torch.randn(4, hidden, generator=torch.Generator().manual_seed(hidden))
    constants = (0.0, -0.0, 2.0, -0.3, 1e-40, 2.0**-100, 2.0**-101, 3e38, 1 / 3, 65504.0)
    rows = [*noise, noise[0] * 1e-20, noise[0] * 1e30]
    rows += [torch.full((hidden,), value) for value in constants]
    for value in (float("nan"), -float("nan"), float("inf"), -float("inf"), 1e4, -1e-30):
        row = noise[1].clone()
        row[hidden // 2] = value
        rows.append(row)
    return torch.stack(rows).to(dtype)


def layout(hidden, sizes, gaps=(0,)):
    """Returns segments, each behind a gap of rows and bytes, the number of rows and of bytes."""
    segments, row, byte = [], 0, 0
    for i, (num_rows, num_bits) in enumerate(sizes):
        gap = gaps[i % len(gaps)]
        row, codes = row + gap, byte + gap
        scales = codes + num_rows * packed_bytes(hidden, num_bits) + gap
        segments.append(ops.OpSegment(row, num_rows, num_bits, codes, scales))
        row, byte = row + num_rows, scales + 4 * num_rows
    return ops.flatten(segments), row + 1, byte + 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_bits", BITS)
def test_special_rows(isa, num_bits, dtype):
    for hidden in (1, 8, 24, 37, 64, 136, 256, 1000):
        rows = special_rows(hidden, dtype)
        segments, _, num_bytes = layout(hidden, [(len(rows), num_bits)])
        message = assert_same_encoding(rows, None, segments, num_bytes)
        assert_same_decoding(message, None, rows, segments)
        scales = absmax(rows)
        for mid_rise in (False, True):
            assert_same_encoding(rows, scales, segments, num_bytes, mid_rise=mid_rise)
        assert_same_decoding(message, scales * 2, rows, segments)


@given(
    hidden=st.integers(1, 300),
    sizes=st.lists(st.tuples(st.integers(0, 5), st.integers(2, 8)), max_size=5),
    gaps=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    key=st.integers(-(2**63), 2**63 - 1),
    offset=WORDS,
    stream=WORDS,
    mid_rise=st.booleans(),
    given_scales=st.booleans(),
    seed=WORDS,
)
@settings(max_examples=150, deadline=None)
def test_mixed_segments_with_gaps(
    isa, hidden, sizes, gaps, dtype, key, offset, stream, mid_rise, given_scales, seed
):
    """Bytes and rows between the segments stay as they were, too."""
    segments, num_rows, num_bytes = layout(hidden, sizes, gaps)
    generator = torch.Generator().manual_seed(seed)
    magnitudes = torch.rand(num_rows, 1, generator=generator).mul(8).exp()
    rows = (torch.randn(num_rows, hidden, generator=generator) * magnitudes).to(dtype)
    scales = absmax(rows) * 1.5 if given_scales else None
    random = {"key": key, "offset": offset, "stream": stream, "mid_rise": mid_rise}
    message = assert_same_encoding(rows, scales, segments, num_bytes, **random)
    assert_same_decoding(message, scales, rows, segments)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("num_bits", BITS)
def test_decoding_of_any_bytes(isa, num_bits, dtype):
    """Scales of every bit pattern, and the code 2L + 1 that no encoder writes."""
    generator = torch.Generator().manual_seed(num_bits)
    for hidden in (13, 64, 200):
        rows = torch.empty(300, hidden, dtype=dtype)
        segments, _, num_bytes = layout(hidden, [(300, num_bits)])
        message = torch.randint(0, 256, (num_bytes,), generator=generator, dtype=torch.uint8)
        assert_same_decoding(message, None, rows, segments)


@pytest.mark.parametrize("mid_rise", [False, True])
@pytest.mark.parametrize("num_bits", BITS)
def test_values_at_the_edge_of_a_code(isa, num_bits, mid_rise):
    """Where the random bits just reach the next code, any operation rounded otherwise shows."""
    generator = torch.Generator().manual_seed(num_bits)
    scales = torch.randint(0x0D000000, 0x7F800000, (1000, 1), generator=generator)
    scales = scales.int().view(torch.float32)
    top = top_level(num_bits, mid_rise=mid_rise) * 65536
    last = 2 * levels(num_bits) + mid_rise
    codes = torch.randint(1, last + 1, (1000, 64), generator=generator)
    edges = codes * 65536 - random_halves(torch.arange(1000), 8, **RANDOM).flatten(1)
    rows = ((edges - top).double() / top * scales).float()
    rows[:, :1] = scales
    segments, _, num_bytes = layout(64, [(1000, num_bits)])
    message = assert_same_encoding(rows, None, segments, num_bytes, mid_rise=mid_rise)
    assert_same_decoding(message, None, rows, segments)


def test_rows_far_down_the_random_stream(isa):
    rows = torch.randn(70000, 8)
    segments = [69990, 10, 5, 3, 60, 65530, 12, 2, 110, 150]
    assert_same_encoding(rows, None, segments, 200)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bytes(isa, dtype):
    """Very unequal segments, far more values than one thread takes."""
    segments, num_rows, num_bytes = layout(256, [(1, 2), (700, 5), (0, 3), (2, 8), (30, 4)], [1])
    rows = torch.randn(num_rows, 256).to(dtype)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            message = assert_same_encoding(rows, None, segments, num_bytes)
            assert_same_decoding(message, None, rows, segments)
    finally:
        torch.set_num_threads(threads)


def test_decoding_to_more_than_the_caches_hold(isa, monkeypatch):
    """From 48 MiB on, the stores may bypass the caches."""
    segments, num_rows, num_bytes = layout(4096, [(3072, 3)])
    message = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
    rows, scales = torch.empty(num_rows, 4096), torch.rand(num_rows)
    decoded = decode(ops.unpack_dequantize, message, scales, rows, segments)
    monkeypatch.setenv(ISA_VARIABLE, "generic")
    for first in range(0, 3072, 1024):
        part = [first, 1024, 3, first * packed_bytes(4096, 3), 0]
        expected = decode(ops.unpack_dequantize, message, scales, rows, part)
        assert torch.equal(decoded[first : first + 1024], expected[first : first + 1024])


def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv(ISA_VARIABLE, "sse9")
    with pytest.raises(ValueError, match=f"{ISA_VARIABLE}=sse9: must be avx512, avx2 or generic"):
        encode(ops.quantize_pack, torch.empty(0, 8), None, [], 0)


ROWS = torch.zeros(4, 16)
BAD_SEGMENTS = [
    ([0, 4, 1, 0, 40], "num_bits"),
    ([0, 4, 9, 0, 40], "num_bits"),
    ([0, 4, 5, 0], "5 integers per segment"),
    ([0, 5, 4, 0, 40], "rows"),
    ([-1, 2, 4, 0, 40], "rows"),
    ([2, -1, 4, 0, 40], "rows"),
    ([2**62, 2**62, 4, 0, 40], "rows"),
    ([0, 4, 4, 19, 0], "codes"),
    ([0, 4, 4, -1, 32], "codes"),
    ([0, 4, 4, 2**63 - 1, 32], "codes"),
    ([0, 4, 4, 0, 35], "scales"),
    ([0, 4, 4, 0, -1], "scales"),
]


@pytest.mark.parametrize(("segments", "named"), BAD_SEGMENTS)
def test_segments_outside_of_the_tensors_are_refused(segments, named):
    for kernel in (ops.quantize_pack, reference):
        with pytest.raises(ValueError, match=named):
            encode(kernel, ROWS, None, segments, 50)
    message = torch.zeros(50, dtype=torch.uint8)
    for kernel in (ops.unpack_dequantize, unpack_dequantize_reference):
        with pytest.raises(ValueError, match=named):
            decode(kernel, message, None, ROWS, segments)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rows": torch.zeros(4, 32)[:, ::2]}, "rows must be contiguous"),
        ({"rows": torch.zeros(4, 16, dtype=torch.int32)}, "floating-point"),
        ({"rows": torch.zeros(64)}, "rows must be"),
        ({"message": torch.zeros(100, dtype=torch.uint8)[::2]}, "message must be contiguous"),
        ({"message": torch.zeros(50, dtype=torch.int8)}, "message must be contiguous uint8"),
        ({"row_scales": torch.zeros(3)}, "row_scales must be"),
        ({"row_scales": torch.zeros(4, dtype=torch.float64)}, "row_scales must be"),
        ({"offset": -1}, "offset"),
        ({"stream": 2**32}, "stream"),
    ],
)
def test_wrong_tensors_are_refused(change, named):
    arguments = {
        "rows": ROWS,
        "row_scales": None,
        "message": torch.zeros(50, dtype=torch.uint8),
        "segments": [0, 4, 4, 0, 34],
    }
    for kernel in (ops.quantize_pack, quantize_pack_reference):
        with pytest.raises(ValueError, match=named):
            kernel(**arguments | RANDOM | change)
    if change.keys() & {"offset", "stream"}:
        return
    for kernel in (ops.unpack_dequantize, unpack_dequantize_reference):
        with pytest.raises(ValueError, match=named):
            kernel(**arguments | change)


def test_opcheck():
    rows, message = torch.randn(5, 24), torch.zeros(100, dtype=torch.uint8)
    segments = [0, 2, 3, 1, 60, 2, 3, 4, 20, 68]
    for scales in (None, torch.full((5,), 10.0)):
        torch.library.opcheck(
            torch.ops.megatron_moe_comp.quantize_pack, (rows, scales, message, segments, 1, 2, 3)
        )
        torch.library.opcheck(
            torch.ops.megatron_moe_comp.unpack_dequantize, (message, scales, rows, segments)
        )
