import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_comp.compression.codecs.terngrad import TernGrad, pack_trits, unpack_trits
from megatron_moe_comp.ops.philox import random_halves
from tests.compression.variants import RANDOM, normal_rows, roundtrip


def test_pack_example_of_the_docstring():
    trits = torch.tensor([[1, 0, 2, 0, 0, 1]], dtype=torch.uint8)
    assert pack_trits(trits).tolist() == [[19, 1]]


@given(num_rows=st.integers(0, 4), num_values=st.integers(1, 40), seed=st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_unpack_inverts_pack(num_rows, num_values, seed):
    generator = torch.Generator().manual_seed(seed)
    trits = torch.randint(0, 3, (num_rows, num_values), generator=generator).to(torch.uint8)
    packed = pack_trits(trits)
    assert packed.shape == (num_rows, math.ceil(num_values / 5))
    assert torch.equal(unpack_trits(packed, num_values), trits)


def test_values_are_ternary_and_kept_as_the_random_numbers_say():
    rows = normal_rows()
    scales = rows.abs().amax(1, keepdim=True)
    decoded = roundtrip(TernGrad(), rows)
    halves = random_halves(torch.arange(16), 32, key=1, offset=2, stream=3).flatten(1)
    is_kept = halves < (rows.abs() / scales * 65536).round()
    assert torch.equal(decoded, torch.where(is_kept, rows.sign() * scales, 0.0))


def test_the_variance():
    x = torch.linspace(-1, 1, 32).repeat(10000, 1)
    variance = roundtrip(TernGrad(), x, random=RANDOM).var(0)
    expected = x[0].abs() * (1 - x[0].abs())
    torch.testing.assert_close(variance, expected, rtol=0.1, atol=0.005)
