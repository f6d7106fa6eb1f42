"""The CUDA kernels, run on the CPU by tests/cuda_emulation, against the reference."""

import ctypes
import math
import mmap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_comp.ops.philox import philox4x32
from megatron_moe_comp.ops.quantize_pack import _reference as reference_quantize_pack
from megatron_moe_comp.ops.unpack_dequantize import _reference as reference_unpack_dequantize
from tests.cuda_emulation import build
from tests.cuda_emulation.gpu import GpuKernels
from tests.cuda_emulation.kernels import ROW_TYPES, EmulatedKernels

pytestmark = pytest.mark.skipif(build.missing_tool() is not None, reason=str(build.missing_tool()))

RANDOM = (0x7766554433221100, 5, 0xFFFFFFFF)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPECIAL_VALUES = (math.nan, math.inf, -math.inf, 6e4, -0.0, 5.0)
EVERY_WIDTH = [(2, 3), (3, 9), (4, 1), (5, 8), (6, 0), (7, 2), (8, 11)]


@pytest.fixture(
    scope="module",
    params=["forward", "reverse"] + ["gpu"] * torch.cuda.is_available(),
)
def kernels(request):
    """The kernels, with the threads of a block in this order, or compiled where there is a GPU."""
    return GpuKernels() if request.param == "gpu" else emulated(request.param == "reverse")


def emulated(reverse):
    return EmulatedKernels(*(build.emulated(op) for op in build.OPS), reverse=reverse)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def bits_of(rows):
    """The rows as NumPy array, sharing memory."""
    return rows.view(torch.int32 if rows.dtype == torch.float32 else torch.int16).numpy().view(
        ROW_TYPES[name_of(rows.dtype)]
    )  # fmt: skip


def segments_of(hidden, widths, *, first=0, start=5, gap=3):
    """Segments one behind the other with gaps, of rows too; and the bytes of the message."""
    table, end = [], start
    for num_bits, num_rows in widths:
        scales = end + num_rows * math.ceil(hidden * num_bits / 8) + gap
        table += [first, num_rows, num_bits, end, scales]
        end = scales + 4 * num_rows + gap
        first += num_rows + num_bits % 2
    return table, end, first


def check(kernels, rows, table, message_bytes, row_scales=None, random=RANDOM, mid_rise=False):
    """Both ops give the bytes of the reference and touch no other."""
    expected = torch.full((message_bytes,), 0xFF, dtype=torch.uint8)
    message = expected.clone()
    reference_quantize_pack(rows, row_scales, expected, table, *random, mid_rise)
    scales = None if row_scales is None else row_scales.numpy()
    kernels.quantize_pack(
        bits_of(rows), name_of(rows.dtype), scales, message.numpy(), table, random, mid_rise
    )
    assert_same_bytes(message.numpy(), expected.numpy())
    # The message may begin at any address, too.
    shifted = torch.cat((message[:1], message))[1:]
    decoded, other = torch.full_like(rows, 7.0), torch.full_like(rows, 7.0)
    reference_unpack_dequantize(expected, row_scales, decoded, table)
    kernels.unpack_dequantize(shifted.numpy(), scales, bits_of(other), name_of(rows.dtype), table)
    # Of NaN, torch itself writes other bits on other machines.
    assert torch.equal(other.isnan(), decoded.isnan())
    assert_same_bytes(bits_of(other.nan_to_num(9)), bits_of(decoded.nan_to_num(9)))


def assert_same_bytes(actual, expected):
    different = np.argwhere(actual != expected)
    if len(different):
        at = tuple(different[0])
        raise AssertionError(
            f"{len(different)} of {actual.size} differ, first at {at}: "
            f"{actual[at]:#x}, not {expected[at]:#x}"
        )


# Around the columns of a vector, a team of 32 and of 256 threads, a part and what is kept.
HIDDEN = [*range(1, 18), 31, 33, 256, 257, 1000, 1023, 1024, 1025, 1032, 2730, 4096, 8191, 8192]
HIDDEN += [8193, 8200, 16384, 16392, 16393]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_same_bytes_as_the_reference(kernels, hidden, dtype):
    table, message_bytes, num_rows = segments_of(hidden, EVERY_WIDTH, first=2)
    generator = torch.Generator().manual_seed(hidden)
    rows = torch.randn(num_rows + 1, hidden, generator=generator) * 3
    check(kernels, rows.to(dtype), table, message_bytes)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("hidden", [7, 264, 1031, 1032, 8200])
def test_given_scales(kernels, hidden, dtype):
    table, message_bytes, num_rows = segments_of(hidden, [(8, 3), (3, 2)])
    rows = torch.randn(num_rows, hidden, generator=torch.Generator().manual_seed(1)).to(dtype)
    scales = rows.float().abs().amax(1) * 1.5
    scales[:4] = torch.tensor([math.inf, math.nan, 2.0**-101, -1.0])
    check(kernels, rows, table, message_bytes, scales)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("hidden", [12, 16, 1032])
def test_special_rows(kernels, hidden, dtype):
    specials = [0.0, -0.0, 1e-45, 1e-38, 1e-31, 2.0**-100, 2.0**-24, 1e-7, 0.1, 3e38, 2.0**127]
    rows = torch.tensor(specials)[:, None].repeat(2, hidden)
    rows[len(specials) :] *= torch.linspace(-1, 1, hidden)
    rows = torch.cat((rows, torch.randn(8, hidden))).to(dtype)
    for row, value in zip(range(-6, 0), SPECIAL_VALUES, strict=True):
        rows[row, hidden - 1] = value
    table, message_bytes, _ = segments_of(hidden, [(b, len(rows)) for b in range(2, 9)], gap=0)
    for i in range(0, len(table), 5):
        table[i] = 0
    # Every width decodes into the same rows: one by one.
    for i in range(0, len(table), 5):
        for mid_rise in (False, True):
            check(kernels, rows, table[i : i + 5], message_bytes, mid_rise=mid_rise)


def test_more_segments_than_one_launch_takes(kernels):
    widths = [(2 + i % 7, i % 4) for i in range(300)]
    table, message_bytes, num_rows = segments_of(24, widths, gap=1)
    check(kernels, torch.randn(num_rows, 24).bfloat16(), table, message_bytes)


def test_no_segments_and_no_rows(kernels):
    rows = torch.randn(3, 16)
    check(kernels, rows, [], 8)
    check(kernels, rows, [3, 0, 4, 8, 8], 8)
    check(kernels, rows[:, :0], [0, 3, 4, 2, 2], 16)


def test_rows_at_an_odd_address(kernels):
    table, message_bytes, num_rows = segments_of(16, EVERY_WIDTH)
    for dtype in DTYPES:
        rows = torch.randn(num_rows * 16 + 1).to(dtype)[1:].view(num_rows, 16)
        check(kernels, rows, table, message_bytes)


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    hidden=st.one_of(st.integers(1, 70), st.sampled_from([512, 1016, 1024, 1031])),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
    mid_rise=st.booleans(),
)
def test_layouts(kernels, data, hidden, dtype, seed, mid_rise):
    widths = data.draw(st.lists(st.tuples(st.integers(2, 8), st.integers(0, 9)), max_size=6))
    table, message_bytes, num_rows = segments_of(
        hidden,
        widths,
        first=data.draw(st.integers(0, 3)),
        start=data.draw(st.integers(0, 33)),
        gap=data.draw(st.integers(0, 17)),
    )
    # Segments may come in any order.
    order = data.draw(st.permutations(range(0, len(table), 5)))
    table = [field for i in order for field in table[i : i + 5]]
    rows = torch.randn(num_rows + 1, hidden, generator=torch.Generator().manual_seed(seed))
    random = (seed << 31, seed, seed ^ 1)
    check(kernels, rows.to(dtype), table, message_bytes, random=random, mid_rise=mid_rise)


def sparse(num_bytes, dtype):
    """Zeros in memory that exists only where it is written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return np.frombuffer(mmap.mmap(-1, num_bytes, flags=flags), dtype)


def test_offsets_beyond_32_bits(kernels):
    hidden, first = 2048, (1 << 20) + 1
    rows = sparse((first + 3) * hidden * 2, np.uint16).reshape(-1, hidden)
    rows[first:] = bits_of(torch.randn(3, hidden).bfloat16())
    start = (1 << 32) + 5
    table = [first, 3, 4, start, start + 4000]
    message, expected = sparse(start + 4012, np.uint8), sparse(start + 4012, np.uint8)
    typed = torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)
    reference_quantize_pack(typed, None, torch.from_numpy(expected), table, *RANDOM)
    kernels.quantize_pack(rows, "bfloat16", None, message, table, RANDOM)
    assert_same_bytes(message[start:], expected[start:])
    decoded = sparse(rows.nbytes, np.uint16).reshape(rows.shape)
    kernels.unpack_dequantize(message, None, decoded, "bfloat16", table)
    reference_unpack_dequantize(torch.from_numpy(expected), None, typed, table)
    assert_same_bytes(decoded[first:], rows[first:])


def test_refuses_what_it_cannot_do():
    with pytest.raises(RuntimeError, match="CUDA error"):
        emulated(reverse=False).quantize_pack(
            np.lib.stride_tricks.as_strided(np.zeros(1, np.uint32), (0, 1 << 28)),
            "float32",
            None,
            np.zeros(4, np.uint8),
            [],
            RANDOM,
        )


def philox_scalar(counter, key):
    """Philox4x32-10 in Python integers, written from the paper."""
    c, k = list(counter), [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize("num_bits", range(2, 9))
def test_same_codes_as_a_scalar_reference(kernels, num_bits):
    """One value at a time in NumPy, without PyTorch and without a kernel's arithmetic."""
    key, offset, stream = 0xABCDEF0123, 77, 0x80000001
    rows = np.random.default_rng(num_bits).standard_normal((4, 21)).astype(np.float32)
    row_bytes = math.ceil(21 * num_bits / 8)
    message = np.zeros(3 * row_bytes + 12, np.uint8)
    table = [1, 3, num_bits, 12, 0]
    kernels.quantize_pack(
        rows.view(np.uint32), "float32", None, message, table, (key, offset, stream)
    )
    decoded = np.zeros_like(rows)
    kernels.unpack_dequantize(message, None, decoded.view(np.uint32), "float32", table)
    f32, levels = np.float32, 2 ** (num_bits - 1) - 1
    top = f32(levels * 65536)
    for r in range(1, 4):
        scale = max(abs(x) for x in rows[r])
        assert message[4 * (r - 1) : 4 * r].tobytes() == scale.tobytes()
        inverse = top / scale
        if inverse * scale > top:
            inverse = np.nextafter(inverse, f32(0))
        stream_of_bits = 0
        for column, x in enumerate(rows[r]):
            word = philox_scalar((column // 8, r, offset, stream), key)[column % 8 // 2]
            half = word >> 16 * (column % 2) & 0xFFFF
            code = (int(np.rint(x * inverse + top)) + half) // 65536
            stream_of_bits |= code << column * num_bits
            assert decoded[r, column] == f32(code - levels) * (scale / f32(levels))
        octets = message[12 + (r - 1) * row_bytes :][:row_bytes]
        assert int.from_bytes(octets.tobytes(), "little") == stream_of_bits


@pytest.fixture(scope="module")
def header():
    return ctypes.CDLL(str(build.header_functions()))


KNOWN_ANSWERS = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
"""Published with the Random123 library (philox4x32-10)."""


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_of_the_header(header, counter, key, expected):
    words = (ctypes.c_uint32 * 4)()
    header.philox((ctypes.c_uint32 * 4)(*counter), ctypes.c_uint64(key), words)
    assert tuple(words) == expected
    reference = philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(word) for word in reference) == expected


@pytest.mark.parametrize("mid_rise", [False, True])
@pytest.mark.parametrize("num_bits", range(2, 9))
def test_inverse_of_the_header(header, num_bits, mid_rise):
    """Bit for bit what the reference divides; a difference would show in one code in a million."""
    scales = torch.exp2(torch.linspace(-99.9, 127.9, 20000))
    top = torch.tensor(float((2**num_bits - 2 + mid_rise) * 32768))
    expected = top.expand_as(scales) / scales
    below = (expected.view(torch.int32) - 1).view(torch.float32)
    expected = torch.where(expected * scales > top, below, expected)
    result = np.empty(len(scales), np.float32)
    header.inverses(
        ctypes.c_void_p(scales.data_ptr()),
        ctypes.c_int64(len(scales)),
        num_bits,
        ctypes.c_bool(mid_rise),
        ctypes.c_void_p(result.ctypes.data),
    )
    assert_same_bytes(result.view(np.uint32), expected.numpy().view(np.uint32))
    assert (result * scales.numpy() <= top.numpy()).all()
