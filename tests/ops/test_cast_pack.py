"""cast_pack and unpack_cast: the references, and the C++ kernels against them, byte for byte."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_comp import ops
from megatron_moe_comp.ops.cast_pack import CAST_FORMATS, _pack_reference, _unpack_reference

FORMATS = list(CAST_FORMATS)
SCALED = ["fp8", "mxfp8"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, 1e-45, -1e-40, 2.0**-100, 2.0**-101]
SPECIAL += [3.4028234e38, -3.39e38, 3.3961e38, 65504.0, 65519.9, 65520.0, 2.0**-24, 2.0**-25]
SPECIAL += [2.0**-9, 2.0**-10, 3 * 2.0**-10, 448.0, 464.0, 480.0, 511.9, 1 / 3]
needs_kernels = pytest.mark.skipif(
    not ops.is_compiled("cpu", "cast_pack"),
    reason="the C++ kernels are not built: run scripts/setup.sh",
)


def layout(name, hidden, sizes, gaps=(0,)):
    """Returns segments, each behind a gap of rows and bytes, the number of rows and of bytes."""
    form, segments, row, byte = CAST_FORMATS[name], [], 0, 0
    for i, num_rows in enumerate(sizes):
        gap = gaps[i % len(gaps)]
        row, numbers = row + gap, byte + gap
        scales = numbers + num_rows * hidden * form.dtype.itemsize + gap
        segments.append(ops.OpSegment(row, num_rows, form.num_bits, numbers, scales))
        row, byte = row + num_rows, scales + num_rows * form.row_scale_bytes(hidden)
    return ops.flatten(segments), row + 1, byte + 5


def pack(kernel, rows, num_bytes, segments, name):
    message = torch.full((num_bytes,), 0xA5, dtype=torch.uint8)
    kernel(rows, message, segments, name)
    return message


def unpack(kernel, message, rows, segments, name):
    rows = torch.full_like(rows, -7.0)
    kernel(message, rows, segments, name)
    return rows


def assert_same_bytes(rows, num_bytes, segments, name):
    message = pack(ops.cast_pack, rows, num_bytes, segments, name)
    wrong = (message != pack(_pack_reference, rows, num_bytes, segments, name)).nonzero().flatten()
    assert not len(wrong), f"{len(wrong)} of {num_bytes} bytes, the first at {int(wrong[0])}"
    return message


def assert_same_rows(message, like, segments, name):
    """Equal bits; of NaN, torch itself writes other bits on other machines."""
    expected = unpack(_unpack_reference, message, like, segments, name)
    rows = unpack(ops.unpack_cast, message, like, segments, name)
    bits = BITS[rows.element_size()]
    same = (rows.view(bits) == expected.view(bits)) | (rows.isnan() & expected.isnan())
    wrong = (~same).nonzero()
    assert not len(wrong), f"{len(wrong)} values, the first at {wrong[0].tolist()}"


def special_rows(hidden, dtype):
    """Noise of all sizes, and each special value alone, everywhere, and among others."""
    generator = torch.Generator().manual_seed(hidden)
    noise = torch.randn(60, hidden, generator=generator)
    rows = [noise, noise * noise.mul(8).exp(), noise * 1e30, noise * 1e-38, noise * 1e-3]
    for value in SPECIAL:
        alone, among = torch.zeros(1, hidden), noise[:1].clone()
        alone[0, hidden // 3] = among[0, hidden // 2] = value
        rows += [torch.full((1, hidden), value), alone, among]
    return torch.cat(rows).to(dtype)


def every_number(dtype):
    """The 2^16 of a 16-bit dtype, or some of float32 that are as close to a tie as can be."""
    if dtype != torch.float32:
        return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    upper = torch.arange(-(2**15), 2**15, 3, dtype=torch.int32) << 16
    return torch.cat([(upper + low).view(dtype) for low in (0, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])


def test_example_of_the_docstring():
    rows = torch.zeros(1, 32)
    rows[0, :2] = torch.tensor([1.0, 3.0])
    for kernel in (ops.cast_pack, _pack_reference):
        message = pack(kernel, rows, 33, [0, 1, 8, 0, 32], "mxfp8")
        assert message[[0, 1, 2, 32]].tolist() == [0x70, 0x7C, 0, 120]


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_special_rows(isa, name, dtype):
    for hidden in (1, 8, 24, 37, 136, 256):
        rows = special_rows(hidden, dtype)
        segments, _, num_bytes = layout(name, hidden, [len(rows)])
        message = assert_same_bytes(rows, num_bytes, segments, name)
        assert_same_rows(message, rows, segments, name)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("name", FORMATS)
def test_every_number_beside_one(isa, name, dtype):
    """Each in a block with a 1.0, so with every scale that there is; NaN arrives as NaN."""
    numbers = every_number(dtype)
    rows = torch.stack((numbers, torch.ones_like(numbers)), 1)
    segments, _, num_bytes = layout(name, 2, [len(rows)])
    message = assert_same_bytes(rows, num_bytes, segments, name)
    assert_same_rows(message, rows, segments, name)
    decoded = unpack(ops.unpack_cast, message, rows, segments, name)
    spoilt = ~numbers.isfinite() if name in SCALED else numbers.isnan()
    assert torch.equal(decoded[:, 0].isnan(), spoilt)


@needs_kernels
@given(
    name=st.sampled_from(FORMATS),
    hidden=st.integers(1, 300),
    sizes=st.lists(st.integers(0, 5), max_size=4),
    gaps=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=50, deadline=None)
def test_segments_with_gaps(isa, name, hidden, sizes, gaps, dtype, seed):
    """At any byte; bytes and rows between the segments stay as they were, too."""
    segments, num_rows, num_bytes = layout(name, hidden, sizes, gaps)
    generator = torch.Generator().manual_seed(seed)
    magnitudes = torch.rand(num_rows, 1, generator=generator).mul(8).exp()
    rows = (torch.randn(num_rows, hidden, generator=generator) * magnitudes).to(dtype)
    message = assert_same_bytes(rows, num_bytes, segments, name)
    assert_same_rows(message, rows, segments, name)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_decoding_of_any_bytes(isa, name, dtype):
    """Every number, with scales of every bit pattern."""
    rows = torch.empty(600, 256, dtype=dtype)
    segments, _, num_bytes = layout(name, 256, [600])
    message = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
    assert_same_rows(message, rows, segments, name)


@needs_kernels
def test_any_number_of_threads_gives_the_same_bytes(isa):
    rows = torch.randn(700, 200)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            segments, _, num_bytes = layout("fp8", 200, [1, 650, 0, 40])
            message = assert_same_bytes(rows, num_bytes, segments, "fp8")
            assert_same_rows(message, rows, segments, "fp8")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_the_format_are_copied(dtype):
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    rows = every_number(dtype).view(64, -1)
    segments, _, num_bytes = layout(name, 1024, [64])
    for packing, unpacking in (
        (ops.cast_pack, ops.unpack_cast),
        (_pack_reference, _unpack_reference),
    ):
        message = pack(packing, rows, num_bytes, segments, name)
        decoded = unpack(unpacking, message, rows, segments, name)
        assert torch.equal(decoded.view(torch.int16), rows.view(torch.int16))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": "fp4"}, "format must be .*not fp4"),
        ({"segments": [0, 4, 4, 0, 128]}, "num_bits must be 8"),
        ({"segments": [0, 4, 8, 0]}, "5 integers per segment"),
        ({"segments": [0, 5, 8, 0, 160]}, "rows"),
        ({"segments": [0, 4, 8, 53, 128]}, "codes"),
        ({"segments": [0, 4, 8, 0, 165]}, "scales"),
        ({"rows": torch.zeros(4, 64)[:, ::2]}, "rows must be contiguous"),
        ({"rows": torch.zeros(4, 32, dtype=torch.int32)}, "floating-point"),
        ({"rows": torch.zeros(32)}, "rows must be"),
        ({"message": torch.zeros(360, dtype=torch.uint8)[::2]}, "message must be contiguous"),
    ],
)
def test_wrong_arguments_are_refused(change, named):
    arguments = {
        "rows": torch.zeros(4, 32),
        "message": torch.zeros(180, dtype=torch.uint8),
        "segments": [0, 4, 8, 0, 164],
        "format": "fp8",
    }
    for kernel in (ops.cast_pack, ops.unpack_cast, _pack_reference, _unpack_reference):
        kernel(**arguments)
        with pytest.raises(ValueError, match=named):
            kernel(**arguments | change)


@pytest.mark.parametrize("name", FORMATS)
def test_opcheck(name):
    rows = torch.randn(5, 24)
    segments, num_rows, num_bytes = layout(name, 24, [2, 2], [0, 1])
    message, casts = torch.zeros(num_bytes, dtype=torch.uint8), torch.ops.megatron_moe_comp
    torch.library.opcheck(casts.cast_pack, (rows[:num_rows], message, segments, name))
    torch.library.opcheck(casts.unpack_cast, (message, rows, segments, name))
