import math

import pytest
import torch

from megatron_moe_comp import ops
from megatron_moe_comp.compression.codecs.fp8 import Float8
from megatron_moe_comp.compression.codecs.mxfp8 import MxFloat8
from tests.compression.variants import RANDOM, normal_rows, plan, roundtrip


def e4m3_values():
    """All finite magnitudes, from the format's definition: 4 exponent bits, 3 of mantissa."""
    subnormal = [m * 2.0**-9 for m in range(8)]
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    return torch.tensor((subnormal + normal)[:-1])  # the last code is NaN


def nearest(values):
    levels = e4m3_values()
    distance = (values.abs()[..., None] - levels).abs().min(-1)
    return distance.values


def scales_of(codec, rows):
    packet = plan(codec, rows, (len(rows),))
    message = packet.encode(rows, [], RANDOM)
    offset = packet.segments[0][1][0].offsets[1]
    size = codec.sections(rows.shape[1], rows.dtype, 8)[1].size(len(rows))
    return message[offset : offset + size].clone()


def test_fp8_scales_make_the_largest_magnitude_448():
    rows = normal_rows(hidden=200)
    scales = scales_of(Float8(), rows).view(torch.float32).view(16, 2)
    largest = torch.stack((rows[:, :128].abs().amax(1), rows[:, 128:].abs().amax(1)), 1)
    assert torch.equal(scales, largest / 448)


def test_fp8_numbers_are_the_nearest():
    rows = normal_rows(hidden=128)
    scales = rows.abs().amax(1, keepdim=True) / 448
    error = (roundtrip(Float8(), rows) - rows).abs() / scales
    torch.testing.assert_close(error, nearest(rows / scales), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("largest", "code"),
    [
        (1.0, 119),  # 2^(119 - 127) = 2^-8, which makes it 2^8
        (1.99, 119),
        (448.0, 127),
        (512.0, 128),
        (0.0, 0),
        (1e-45, 0),
        (2.0**-118, 1),
        (2.0**-119, 0),
        (torch.finfo(torch.float32).max, 246),
        (math.nan, 255),
        (-math.inf, 255),
    ],
)
def test_mxfp8_scales_are_exponents(largest, code):
    rows = torch.zeros(1, 64)
    rows[0, 37] = largest
    assert scales_of(MxFloat8(), rows).tolist() == [0, code]


def test_mxfp8_numbers_are_the_nearest_or_saturate():
    rows = normal_rows(hidden=32, num_rows=200)
    largest = rows.abs().amax(1, keepdim=True)
    scales = torch.tensor([[2.0 ** (math.floor(math.log2(m)) - 8)] for m in largest.flatten()])
    decoded = roundtrip(MxFloat8(), rows)
    assert torch.equal((decoded - rows).abs() / scales, nearest(rows / scales))
    assert ((largest / scales) > 480).any()  # some saturate


@pytest.mark.parametrize("codec", [Float8(), MxFloat8()])
def test_the_error_is_as_documented(codec):
    rows = normal_rows(num_rows=64)
    error = (roundtrip(codec, rows) - rows).abs()
    limit = 1 / 16 if codec.name == "fp8" else 1 / 8
    blocks = rows.view(-1, ops.CAST_FORMATS[codec.name].block_size).abs()
    large = blocks >= blocks.amax(1, keepdim=True) / 2**14
    assert (error.view_as(blocks) <= blocks * limit * 1.001)[large].all()
    assert large.double().mean() > 0.99
