import hashlib
import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_comp import ops
from megatron_moe_comp.ops import segments
from megatron_moe_comp.ops.quantize_pack import (
    SMALLEST_SCALE,
    _reference,
    absmax,
    levels,
    pack,
    packed_bytes,
    quantize,
)
from megatron_moe_comp.ops.unpack_dequantize import unpack

BITS = range(2, 9)
RANDOM = {"key": 1, "offset": 2, "stream": 3}


def encode(rows, num_bits, scales=None, **random):
    """Returns a message of codes and, behind them, scales, and its one segment."""
    code_bytes = len(rows) * packed_bytes(rows.shape[1], num_bits)
    segment = ops.flatten([ops.OpSegment(0, len(rows), num_bits, 0, code_bytes)])
    message = torch.full((code_bytes + 4 * len(rows),), 0xFF, dtype=torch.uint8)
    ops.quantize_pack(rows, scales, message, segment, **RANDOM | random)
    return message, segment


def roundtrip(rows, num_bits, scales=None, dtype=torch.float32, **random):
    message, segment = encode(rows, num_bits, scales, **random)
    decoded = torch.full_like(rows, -7.0, dtype=dtype)
    ops.unpack_dequantize(message, scales, decoded, segment)
    return decoded


def test_pack_example_of_the_docstring():
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8)
    assert pack(codes, 3).numpy().tobytes().hex() == "d1581f"


def test_quantize_example_of_the_docstring():
    rows = torch.tensor([[0.0, 0.5, -1.0]]).repeat(4000, 1)
    q = quantize(rows, torch.ones(4000), 3, 0, **RANDOM).int() - levels(3)
    assert (q[:, 0] == 0).all()
    assert (q[:, 2] == -3).all()
    assert set(q[:, 1].tolist()) == {1, 2}
    assert abs((q[:, 1] == 1).double().mean() - 0.5) < 4.5 * 0.5 / 4000**0.5


@given(
    num_bits=st.integers(1, 8),
    num_rows=st.integers(0, 5),
    num_values=st.integers(1, 67),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=300, deadline=None)
def test_unpack_inverts_pack(num_bits, num_rows, num_values, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << num_bits, (num_rows, num_values), generator=generator)
    codes = codes.to(torch.uint8)
    packed = pack(codes, num_bits)
    assert packed.shape == (num_rows, math.ceil(num_values * num_bits / 8))
    assert torch.equal(unpack(packed, num_bits, num_values), codes)
    # The layout is a plain little-endian bit stream, whatever the width.
    for row, octets in zip(codes.tolist(), packed, strict=True):
        stream = int.from_bytes(octets.numpy().tobytes(), "little")
        assert stream == sum(code << i * num_bits for i, code in enumerate(row))


@pytest.mark.parametrize("num_bits", BITS)
def test_mid_rise_levels_are_in_use_alike(num_bits):
    """Uniform values fall on all 2^b codes equally often, but for half steps at both ends."""
    rows = torch.linspace(-1, 1, 20000).repeat(8, 1)
    codes = quantize(rows, torch.ones(8), num_bits, 0, **RANDOM, mid_rise=True)
    shares = codes.flatten().bincount(minlength=2**num_bits).double() / codes.numel()
    expected = torch.full_like(shares, 1 / (2**num_bits - 1))
    expected[[0, -1]] /= 2
    deviation = (expected / codes.numel()).sqrt()
    assert ((shares - expected).abs() < 4.5 * deviation).all()


@pytest.mark.parametrize("mid_rise", [False, True])
def test_codes_of_rows_without_a_scale_are_those_of_a_zero(mid_rise):
    rows = torch.full((4, 16), 1e-40)
    scales = torch.tensor([0.0, 1e-40, math.nan, math.inf])
    codes = quantize(rows, scales, 3, 0, **RANDOM, mid_rise=mid_rise)
    assert (codes == levels(3)).all()


@pytest.mark.parametrize("num_bits", BITS)
def test_unbiased(num_bits):
    """z-test of the mean of many draws against x, for every value of a row with an outlier."""
    draws = 20000
    x = torch.cat((torch.linspace(-1, 1, 29), torch.tensor([3.0, 0.0, 1e-3])))
    decoded = roundtrip(x.repeat(draws, 1), num_bits).double()
    step = 3.0 / levels(num_bits)
    u = x.double().abs() / step
    fraction = u - u.floor()
    deviation = step * (fraction * (1 - fraction)).sqrt()
    error = (decoded.mean(0) - x).abs()
    # 16 random bits and float32 resolve a level to about 2^-16.
    assert (error <= 4.5 * deviation / draws**0.5 + step * 2**-15).all()
    assert (decoded.std(0) <= step / 2 * 1.001).all()


@pytest.mark.parametrize("num_bits", BITS)
def test_error_is_below_one_level(num_bits):
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    step = x.abs().amax(1, keepdim=True) / levels(num_bits)
    for rows in (x, -x):
        assert ((roundtrip(rows, num_bits) - rows).abs() <= step * 1.0001).all()


def test_scales_are_those_of_absmax():
    rows = torch.randn(6, 16)
    rows[1], rows[2, 3], rows[3, 5], rows[4] = -0.0, math.nan, -math.inf, 1e-40
    message, segment = encode(rows, 4)
    scales = message[segment[-1] :].clone().view(torch.float32)
    expected = [rows[0].abs().max(), 0.0, math.nan, math.nan, rows[4, 0], rows[5].abs().max()]
    for computed in (scales, absmax(rows)):
        assert torch.equal(computed.view(torch.int32), torch.tensor(expected).view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_bits", BITS)
def test_zero_constant_and_tiny_rows(num_bits, dtype):
    rows = torch.tensor([[0.0], [-0.0], [2.0], [-0.5]]).repeat(1, 24).to(dtype)
    assert torch.equal(roundtrip(rows, num_bits, dtype=dtype), rows.abs() * rows.sign())
    tiny = torch.tensor([[1e-38], [1e-31], [1e-45]]).repeat(1, 8)
    assert (roundtrip(tiny, num_bits) == 0).all()
    small = torch.full((1, 8), 2.0**-100)
    assert torch.equal(roundtrip(small, num_bits), small)
    huge = torch.full((1, 8), 3e38)
    assert torch.allclose(roundtrip(huge, num_bits), huge)


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_bad_scale_never_gives_finite_garbage(scale):
    rows = torch.tensor([[1.0, math.nan, math.inf, -math.inf, 0.0, 5.0, -5.0, 2.0]])
    assert not roundtrip(rows, 4, scales=torch.tensor([scale])).isfinite().any()
    assert roundtrip(rows, 4).isnan().all()


def test_the_random_numbers_follow_the_row_not_the_block(monkeypatch):
    rows = torch.randn(40, 16)
    whole = torch.zeros(40 * 6, dtype=torch.uint8)
    in_blocks = whole.clone()
    table = ops.flatten([ops.OpSegment(0, 40, 3, 0, 0)])
    _reference(rows, absmax(rows), whole, table, *RANDOM.values())
    monkeypatch.setattr(segments, "_BLOCK_VALUES", 48)
    _reference(rows, absmax(rows), in_blocks, table, *RANDOM.values())
    assert torch.equal(in_blocks, whole)


def test_the_bytes_do_not_depend_on_the_segments():
    rows = torch.randn(40, 16)
    message, _ = encode(rows, 3)
    halves = torch.zeros_like(message)
    for first in (0, 17):
        num_rows = 17 if first == 0 else 23
        segment = ops.OpSegment(first, num_rows, 3, 6 * first, 6 * 40 + 4 * first)
        ops.quantize_pack(rows, None, halves, ops.flatten([segment]), **RANDOM)
    assert torch.equal(halves, message)


@pytest.mark.parametrize("name", ["key", "offset", "stream"])
def test_same_seed_same_bytes_and_no_other(name):
    rows = torch.randn(32, 64)
    once = roundtrip(rows, 2)
    assert torch.equal(roundtrip(rows, 2), once)
    assert not torch.equal(roundtrip(rows, 2, **{name: 99}), once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    rows = torch.randn(5, 24).to(dtype)
    message = torch.zeros(100, dtype=torch.uint8)
    table = [0, 2, 3, 1, 60, 2, 3, 4, 20, 68]
    for scales in (None, torch.full((5,), 10.0)):
        torch.library.opcheck(
            torch.ops.megatron_moe_comp.quantize_pack, (rows, scales, message, table, 1, 2, 3)
        )
        torch.library.opcheck(
            torch.ops.megatron_moe_comp.unpack_dequantize, (message, scales, rows, table)
        )


def test_empty():
    assert roundtrip(torch.empty(0, 16), 5).shape == (0, 16)
    message = torch.full((40,), 7, dtype=torch.uint8)
    ops.quantize_pack(torch.ones(3, 16), None, message, [], **RANDOM)
    ops.quantize_pack(torch.ones(3, 16), None, message, [1, 0, 4, 40, 40], **RANDOM)
    assert (message == 7).all()


GOLDEN = {
    2: "6ea44a0f372630b4",
    3: "b372f223ce8839d4",
    4: "f832b0f15d8fbfb1",
    5: "4a95f7c71fcea4f9",
    6: "f0f125a898eaee0c",
    7: "d54ea97f878f1c49",
    8: "07d5b1d7db8bf4b4",
}


GOLDEN_MID_RISE = {
    2: "8fbd063dba40814a",
    3: "6a08371972d7a489",
    4: "8a3c2a76bf42ac1f",
    5: "5b48aa75b1ba4d38",
    6: "386a7f7bade9f627",
    7: "9405f1dc61ed6eb1",
    8: "8b162baf0409f7d4",
}


@pytest.mark.parametrize(("mid_rise", "golden"), [(False, GOLDEN), (True, GOLDEN_MID_RISE)])
@pytest.mark.parametrize("num_bits", BITS)
def test_the_bytes_never_change(num_bits, mid_rise, golden):
    """What a seed means is part of the format: a resumed run repeats its bits, on any machine."""
    rows = (torch.arange(24 * 40) * 2654435761 % 2001 - 1000).float().view(24, 40) / 64
    seed = {"key": 0x123456789ABCDEF, "offset": 11, "stream": 0xFFFFFFFF}
    message, segment = encode(rows, num_bits, **seed, mid_rise=mid_rise)
    assert hashlib.sha256(message.numpy().tobytes()).hexdigest()[:16] == golden[num_bits]
    message.fill_(0xFF)
    _reference(rows, None, message, segment, *seed.values(), mid_rise)
    assert hashlib.sha256(message.numpy().tobytes()).hexdigest()[:16] == golden[num_bits]


def philox_scalar(counter, key):
    """Philox4x32-10 in Python integers, written from the paper and apart from ops/philox.py."""
    c, k = list(counter), [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def code_scalar(x, scale, num_bits, half, mid_rise):
    """The code of one value, from NumPy's float32 scalars, which round after every operation."""
    f32 = numpy.float32
    top = f32((2**num_bits - 2 + mid_rise) * 32768)
    inverse = top / f32(scale)
    if inverse * f32(scale) > top:
        inverse = numpy.nextafter(inverse, f32(0))
    return (int(numpy.rint(f32(x) * inverse + top)) + half) >> 16


@pytest.mark.parametrize("mid_rise", [False, True])
@pytest.mark.parametrize("num_bits", BITS)
def test_codes_equal_a_scalar_reference(num_bits, mid_rise):
    rows = torch.randn(3, 21, generator=torch.Generator().manual_seed(num_bits)) * 5
    key, offset, stream = 0xABCDEF0123, 77, 0x80000001
    random = {"key": key, "offset": offset, "stream": stream}
    message, _ = encode(rows, num_bits, **random, mid_rise=mid_rise)
    row_bytes = packed_bytes(21, num_bits)
    for r in range(3):
        expected = 0
        for column in range(21):
            words = philox_scalar((column // 8, r, offset, stream), key)
            half = words[column % 8 // 2] >> 16 * (column % 2) & 0xFFFF
            code = code_scalar(rows[r, column], rows[r].abs().max(), num_bits, half, mid_rise)
            assert 0 <= code <= 2**num_bits - 2 + mid_rise
            expected |= code << column * num_bits
        packed = message[r * row_bytes : (r + 1) * row_bytes]
        assert int.from_bytes(packed.numpy().tobytes(), "little") == expected


@given(exponent=st.floats(-30, 38), num_bits=st.integers(2, 8))
@settings(max_examples=300, deadline=None)
def test_the_largest_magnitude_never_passes_the_top_level(exponent, num_bits):
    """Whatever the scale, +s and -s are the outermost codes; one beyond would not fit its bits."""
    scale = min(10.0**exponent, 3.4e38)
    rows = torch.tensor([[scale, -scale, 0.0]])
    codes = quantize(rows, absmax(rows), num_bits, 0, **RANDOM)
    if float(absmax(rows)) >= SMALLEST_SCALE:
        assert codes.tolist() == [[2 * levels(num_bits), 0, levels(num_bits)]]
        codes = quantize(rows, absmax(rows), num_bits, 0, **RANDOM, mid_rise=True)
        assert codes[0, :2].tolist() == [2**num_bits - 1, 0]
