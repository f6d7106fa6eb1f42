import math

import pytest
import torch

from megatron_moe_comp.compression.codecs.cast import BFloat16Cast, Float16Cast
from tests.compression.variants import normal_rows, roundtrip


@pytest.mark.parametrize(
    ("codec", "dtype"), [(BFloat16Cast(), torch.bfloat16), (Float16Cast(), torch.float16)]
)
def test_a_cast_rounds_as_torch_does_within_range(codec, dtype):
    rows = normal_rows()
    assert torch.equal(roundtrip(codec, rows), rows.to(dtype).float())
    own = rows.to(dtype)
    own[0, :3] = torch.tensor([math.inf, -math.inf, torch.finfo(dtype).max])
    assert torch.equal(roundtrip(codec, own), own)


def test_values_out_of_range_saturate_and_infinities_stay():
    rows = torch.tensor([[7e4, -7e4, 65510.0, math.inf, -math.inf, 65504.0, 1e-9, -0.0]])
    top = 65504.0
    expected = torch.tensor([[top, -top, top, math.inf, -math.inf, top, 0.0, 0.0]])
    assert torch.equal(roundtrip(Float16Cast(), rows), expected)
    largest = torch.finfo(torch.bfloat16).max
    decoded = roundtrip(BFloat16Cast(), torch.full((1, 8), torch.finfo(torch.float32).max))
    assert (decoded == largest).all()


def test_float16_rows_do_not_overflow_through_bfloat16():
    rows = torch.full((1, 8), -65504.0, dtype=torch.float16)
    assert torch.equal(roundtrip(BFloat16Cast(), rows), rows)
