import hashlib
import math
import sys

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_comp import ops
from megatron_moe_comp.ops.quantize_pack import levels, pack, packed_bytes, quantize
from megatron_moe_comp.ops.unpack_dequantize import unpack

BITS = range(2, 9)
RANDOM = {"key": 1, "offset": 2, "stream": 3}


def roundtrip(rows, num_bits, scales=None, dtype=torch.float32, **random):
    scales = rows.abs().amax(1).float() if scales is None else scales
    random = RANDOM | random
    packed = ops.quantize_pack(rows, scales, num_bits, *random.values())
    return ops.unpack_dequantize(packed, scales, num_bits, rows.shape[1], dtype)


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
def test_unbiased(num_bits):
    """z-test of the mean of many draws against x, for every value of a row with an outlier."""
    draws = 20000
    x = torch.cat((torch.linspace(-1, 1, 29), torch.tensor([3.0, 0.0, 1e-3])))
    decoded = roundtrip(x.expand(draws, -1), num_bits).double()
    step = 3.0 / levels(num_bits)
    u = x.double().abs() / step
    fraction = u - u.floor()
    deviation = step * (fraction * (1 - fraction)).sqrt()
    error = (decoded.mean(0) - x).abs()
    # 16 random bits and float32 resolve a level to about 2^-16.
    assert (error <= 4.5 * deviation / draws**0.5 + step * 2**-15).all()
    assert (decoded.std(0) <= step / 2 * 1.001).all()


@pytest.mark.parametrize("num_bits", BITS)
def test_error_is_below_one_level_and_signs_are_symmetric(num_bits):
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    decoded = roundtrip(x, num_bits)
    step = x.abs().amax(1, keepdim=True) / levels(num_bits)
    assert ((decoded - x).abs() <= step * 1.0001).all()
    assert torch.equal(roundtrip(-x, num_bits), -decoded)


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
    decoded = roundtrip(rows, 4, scales=torch.tensor([scale]))
    assert not decoded.isfinite().any()


def test_the_random_numbers_follow_the_row_not_the_block(monkeypatch):
    rows = torch.randn(40, 16)
    whole = roundtrip(rows, 3)
    # The op's function hides its module's name.
    monkeypatch.setattr(sys.modules[quantize.__module__], "_BLOCK_VALUES", 48)
    assert torch.equal(roundtrip(rows, 3), whole)


@pytest.mark.parametrize("name", ["key", "offset", "stream"])
def test_same_seed_same_bytes_and_no_other(name):
    rows = torch.randn(32, 64)
    once = roundtrip(rows, 2)
    assert torch.equal(roundtrip(rows, 2), once)
    assert not torch.equal(roundtrip(rows, 2, **{name: 99}), once)


@pytest.mark.parametrize("num_bits", BITS)
def test_opcheck(num_bits):
    rows = torch.randn(5, 24)
    scales = rows.abs().amax(1)
    torch.library.opcheck(
        torch.ops.megatron_moe_comp.quantize_pack, (rows, scales, num_bits, 1, 2, 3)
    )
    packed = ops.quantize_pack(rows, scales, num_bits, 1, 2, 3)
    assert packed.shape == (5, packed_bytes(24, num_bits))
    torch.library.opcheck(
        torch.ops.megatron_moe_comp.unpack_dequantize,
        (packed, scales, num_bits, 24, torch.bfloat16),
    )


def test_empty():
    rows = torch.empty(0, 16)
    assert roundtrip(rows, 5, scales=torch.empty(0)).shape == (0, 16)


GOLDEN = {
    2: "745ce77e57386792",
    3: "4f1ea4cef41ebf3e",
    4: "986d3681983233b1",
    5: "5cb8819a0fa1e146",
    6: "298d237375fc614e",
    7: "6045382e54aa8123",
    8: "5fabb31505552d92",
}


@pytest.mark.parametrize("num_bits", BITS)
def test_the_bytes_never_change(num_bits):
    """What a seed means is part of the format: a resumed run repeats its bits, on any machine."""
    rows = (torch.arange(24 * 40) * 2654435761 % 2001 - 1000).float().view(24, 40) / 64
    seed = (0x123456789ABCDEF, 11, 0xFFFFFFFF)
    packed = ops.quantize_pack(rows, rows.abs().amax(1), num_bits, *seed)
    digest = hashlib.sha256(packed.numpy().tobytes()).hexdigest()
    assert digest[:16] == GOLDEN[num_bits]


def philox_scalar(counter, key):
    """Philox4x32-10 in Python integers, written from the paper and apart from ops/philox.py."""
    c, k = list(counter), [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize("num_bits", BITS)
def test_codes_equal_a_scalar_reference(num_bits):
    rows = torch.randn(3, 21, generator=torch.Generator().manual_seed(num_bits)) * 5
    key, offset, stream = 0xABCDEF0123, 77, 0x80000001
    scales = rows.abs().amax(1)
    packed = ops.quantize_pack(rows, scales, num_bits, key, offset, stream)
    f32, top = numpy.float32, levels(num_bits)
    for r in range(3):
        inverse = f32(top) / f32(scales[r])
        expected = 0
        for column in range(21):
            words = philox_scalar((column // 8, r, offset, stream), key)
            half = words[column % 8 // 2] >> 16 * (column % 2) & 0xFFFF
            x = f32(rows[r, column])
            u = min(abs(x) * inverse, f32(top))
            level = (int(u * f32(65536) + f32(0.5)) + half) >> 16
            expected |= (top + (-level if x < 0 else level)) << column * num_bits
        assert int.from_bytes(packed[r].numpy().tobytes(), "little") == expected
