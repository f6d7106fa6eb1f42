import math
from itertools import pairwise

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_comp import ops
from megatron_moe_comp.ops.gaussian import (
    CELLS,
    MAGNITUDES,
    THRESHOLDS,
    _pack_reference,
    _unpack_reference,
    nearest_levels,
    rms,
)
from megatron_moe_comp.ops.quantize_pack import packed_bytes

BITS = (2, 3, 4)


def density(x):
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def tail(x):
    return math.erfc(x / math.sqrt(2)) / 2


def cells_between(levels):
    """The parts of the positive half line that are nearest to each level."""
    return list(pairwise([0, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]))


def parts(num_bits):
    """The parts of the positive half line that become each level."""
    return list(pairwise([0, *(t / CELLS for t in THRESHOLDS[num_bits]), math.inf]))


def mean_square_error(levels, bounds):
    """Of a normal value whose magnitude becomes the level of the part that it is in."""
    total = 0
    for level, (a, b) in zip(levels, bounds, strict=True):
        mass, first = tail(a) - tail(b), density(a) - density(b)
        second = mass + a * density(a) - (0 if b == math.inf else b * density(b))
        total += 2 * (second - 2 * level * first + level**2 * mass)
    return total


def slope_of(levels, bounds):
    """E[x * level of x] of a normal value x."""
    pairs = zip(levels, bounds, strict=True)
    return sum(2 * level * (density(a) - density(b)) for level, (a, b) in pairs)


@pytest.mark.parametrize("num_bits", BITS)
def test_levels_are_lloyds_divided(num_bits):
    """Each of Lloyd's is the mean of its part, and each part what is nearest to its level."""
    levels = [(i + 0.5) * 3 / 2 ** (num_bits - 1) for i in range(2 ** (num_bits - 1))]
    for _ in range(2000):
        bounds = cells_between(levels)
        levels = [(density(a) - density(b)) / (tail(a) - tail(b)) for a, b in bounds]
    least = mean_square_error(levels, bounds)
    slope = slope_of(levels, parts(num_bits))
    divided = numpy.float32([level / slope for level in levels])
    assert divided.tolist() == numpy.float32(MAGNITUDES[num_bits]).tolist()
    thresholds = [b for _, b in bounds[:-1]]
    assert [round(b * CELLS) for b in thresholds] == list(THRESHOLDS[num_bits])
    assert slope_of(levels, bounds) == pytest.approx(1 - least)
    assert least <= mean_square_error(levels, parts(num_bits)) < 1.0011 * least


def test_nearest_levels_example_of_the_docstring():
    rows = torch.tensor([[-2.0, -0.01, 0.0, 0.97, 0.98]])
    codes = nearest_levels(rows, torch.ones(1, dtype=torch.bfloat16), 2)
    assert codes.tolist() == [[0, 1, 2, 2, 3]]


@given(
    hidden=st.one_of(st.integers(1, 100), st.sampled_from([1023, 1024, 1025, 2500])),
    seed=st.integers(0, 2**31),
    size=st.integers(-20, 20),
)
@settings(max_examples=60, deadline=None)
def test_scales_equal_a_scalar_reference(hidden, seed, size):
    rows = torch.randn(2, hidden, generator=torch.Generator().manual_seed(seed)) * 10.0**size
    rows = rows * torch.rand(hidden, generator=torch.Generator().manual_seed(seed)).mul(9).exp()
    for row, scale in zip(rows.double().tolist(), rms(rows), strict=True):
        total = 0.0
        for start in range(0, hidden, 1024):
            lanes = [0.0] * 32
            for i, x in enumerate(row[start : start + 1024]):
                lanes[i % 32] += x * x
            while len(lanes) > 1:
                half = len(lanes) // 2
                lanes = [a + b for a, b in zip(lanes[:half], lanes[half:], strict=True)]
            total += lanes[0]
        expected = torch.tensor(math.sqrt(total / hidden), dtype=torch.float64)
        assert scale == expected.float().bfloat16()


def encoded(rows, num_bits):
    code_bytes = len(rows) * packed_bytes(rows.shape[1], num_bits)
    table = ops.flatten([ops.OpSegment(0, len(rows), num_bits, 0, code_bytes)])
    message = torch.full((code_bytes + 2 * len(rows),), 0xFF, dtype=torch.uint8)
    ops.gaussian_pack(rows, message, table)
    return message, table


def roundtrip(rows, num_bits):
    message, table = encoded(rows, num_bits)
    decoded = torch.full_like(rows, -7.0)
    ops.gaussian_unpack(message, decoded, table)
    return decoded


@pytest.mark.parametrize("num_bits", BITS)
def test_error_of_normal_rows_is_small_and_uncorrelated(num_bits):
    rows = torch.randn(2000, 256, generator=torch.Generator().manual_seed(num_bits))
    decoded = roundtrip(rows, num_bits)
    error = (decoded - rows).square().mean() / rows.square().mean()
    expected = mean_square_error(MAGNITUDES[num_bits], parts(num_bits))
    assert abs(error / expected - 1) < 0.01
    slope = (decoded * rows).mean() / rows.square().mean()
    assert abs(slope - 1) < 0.005


@pytest.mark.parametrize("num_bits", BITS)
def test_levels_arrive(num_bits):
    """In all columns of a row, with both signs: codes are in the order of the levels."""
    magnitudes = torch.tensor(MAGNITUDES[num_bits])
    levels = torch.cat((-magnitudes.flip(0), magnitudes))
    codes = torch.arange(40) % len(levels)
    message, table = encoded(torch.ones(1, 40), num_bits)
    stream = sum(int(code) << i * num_bits for i, code in enumerate(codes))
    octets = list(stream.to_bytes(packed_bytes(40, num_bits), "little"))
    message[: len(octets)] = torch.tensor(octets, dtype=torch.uint8)
    decoded = torch.empty(1, 40)
    ops.gaussian_unpack(message, decoded, table)
    assert torch.equal(decoded[0], levels[codes])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_bits", BITS)
def test_special_rows(num_bits, dtype):
    largest = torch.finfo(dtype).max
    rows = torch.ones(6, 16).to(dtype)
    rows[0] = -0.0
    rows[1, 3] = math.inf
    rows[2, 5] = math.nan
    rows[3] = largest
    rows[4, ::2] = -largest
    rows[5] = 1e-36
    decoded = roundtrip(rows, num_bits)
    assert (decoded[[0, 5]] == 0).all()
    assert decoded[1:3].isnan().all()
    assert decoded[3:5].isfinite().all()
    assert (decoded[3] > largest / 2).all()


BAD = [
    ({"segments": [0, 2, 5, 0, 20]}, "num_bits"),
    ({"segments": [0, 3, 4, 0, 16]}, "rows"),
    ({"segments": [0, 2, 4, 0, 17]}, "scales"),
    ({"segments": [0, 2, 4, 5, 0]}, "codes"),
    ({"rows": torch.zeros(2, 32)[:, ::2]}, "rows must be contiguous"),
    ({"message": torch.zeros(20, dtype=torch.int8)}, "message must be contiguous uint8"),
]


@pytest.mark.parametrize(("change", "named"), BAD)
def test_wrong_arguments_are_refused(change, named):
    arguments = {
        "message": torch.zeros(20, dtype=torch.uint8),
        "rows": torch.zeros(2, 16),
        "segments": [0, 2, 4, 0, 16],
    }
    for kernel in (ops.gaussian_pack, _pack_reference, ops.gaussian_unpack, _unpack_reference):
        with pytest.raises(ValueError, match=named):
            kernel(**arguments | change)


def test_opcheck():
    rows = torch.randn(7, 24)
    message, table = encoded(rows, 3)
    library = torch.ops.megatron_moe_comp
    torch.library.opcheck(library.gaussian_pack.default, (rows, message, table))
    torch.library.opcheck(library.gaussian_unpack.default, (message, rows, table))
