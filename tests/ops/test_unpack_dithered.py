import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_comp import ops
from megatron_moe_comp.ops.philox import random_halves
from megatron_moe_comp.ops.quantize_pack import absmax, packed_bytes, quantize
from megatron_moe_comp.ops.unpack_dithered import _reference, dequantize_dithered

KEY = 0x123456789ABCDEF
RANDOM = {"offset": 0xFFFFFFFF, "stream": 0x80000001}


def test_example_of_the_docstring():
    halves = random_halves(torch.arange(3000), 1, key=KEY, **RANDOM)[:, 0, :1]
    codes = torch.full_like(halves, 5, dtype=torch.uint8)
    values = dequantize_dithered(codes, torch.ones(3000), 3, 0, key=KEY, **RANDOM)
    expected = (2 - halves.double() / 65536) / 3.5
    torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=1e-7)
    assert abs(values.max() - 2 / 3.5) < 1e-3
    assert abs(values.min() - 1 / 3.5) < 1e-3


@given(
    num_bits=st.integers(2, 8),
    hidden=st.integers(1, 40),
    first_row=st.integers(0, 2**32 - 5),
    exponent=st.integers(-99, 126),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_every_value_is_half_a_step_off_at_most(num_bits, hidden, first_row, exponent, seed):
    rows = torch.randn(5, hidden, generator=torch.Generator().manual_seed(seed))
    rows = rows / rows.abs().max() * 2.0**exponent
    scales, random = absmax(rows), {"key": seed, **RANDOM}
    codes = quantize(rows, scales, num_bits, first_row, **random, mid_rise=True)
    values = dequantize_dithered(codes, scales, num_bits, first_row, **random)
    usable = scales >= 2.0**-100
    step = torch.where(usable, scales, 0).double() * 2 / (2**num_bits - 1)
    rows = torch.where(usable[:, None], rows, 0)
    error = (values.double() - rows.double()).abs().amax(1)
    # A unit of the fixed point, and what float32 resolves.
    assert (error <= step * (0.5 + 2**-16 + 2**num_bits * 2**-24)).all()


def encoded(rows, num_bits):
    code_bytes = len(rows) * packed_bytes(rows.shape[1], num_bits)
    table = ops.flatten([ops.OpSegment(0, len(rows), num_bits, 0, code_bytes)])
    message = torch.full((code_bytes + 4 * len(rows),), 0xFF, dtype=torch.uint8)
    ops.quantize_pack(rows, None, message, table, key=KEY, **RANDOM, mid_rise=True)
    return message, table


@pytest.mark.parametrize("num_bits", [2, 3, 8])
def test_rows_arrive_wherever_they_go(num_bits):
    """Into other places, as segments of other senders, in any order."""
    rows = torch.randn(7, 24, generator=torch.Generator().manual_seed(1))
    message, table = encoded(rows, num_bits)
    whole = torch.full_like(rows, math.nan)
    ops.unpack_dithered(message, whole, table, [0, KEY], **RANDOM)
    row_bytes = packed_bytes(24, num_bits)
    codes = [first * row_bytes for first in (5, 0)]
    scales = [7 * row_bytes + first * 4 for first in (5, 0)]
    parts = [3, 2, num_bits, codes[0], scales[0], 6, 5, num_bits, codes[1], scales[1]]
    elsewhere = torch.full((12, 24), -7.0)
    ops.unpack_dithered(message, elsewhere, parts, [5, KEY, 0, KEY], **RANDOM)
    assert torch.equal(elsewhere[3:5], whole[5:])
    assert torch.equal(elsewhere[6:11], whole[:5])
    assert (elsewhere[[0, 1, 2, 5, 11]] == -7).all()
    for senders in ([1, KEY], [0, KEY + 1]):
        other = torch.empty_like(rows)
        ops.unpack_dithered(message, other, table, senders, **RANDOM)
        assert not (other == whole).all(1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_special_rows(dtype):
    largest = torch.finfo(dtype).max
    rows = torch.ones(4, 16).to(dtype)
    rows[0] = 0
    rows[1, 3] = math.inf
    rows[2] = largest
    rows[3, ::2] = -largest
    message, table = encoded(rows, 2)
    decoded = torch.empty_like(rows)
    ops.unpack_dithered(message, decoded, table, [0, KEY], **RANDOM)
    assert (decoded[0] == 0).all()
    assert decoded[1].isnan().all()
    assert decoded[2:].isfinite().all()
    assert (decoded[2] == largest).any()


BAD = [
    ({"senders": [0]}, "2 integers per segment"),
    ({"senders": [0, 1, 0, 1]}, "2 integers per segment"),
    ({"senders": [-1, 1]}, "sender's rows"),
    ({"senders": [2**32 - 1, 1]}, "sender's rows"),
    ({"offset": -1}, "offset"),
    ({"stream": 2**32}, "stream"),
    ({"segments": [0, 3, 4, 0, 16]}, "rows"),
    ({"segments": [0, 2, 4, 0, 17]}, "scales"),
]


@pytest.mark.parametrize(("change", "named"), BAD)
def test_wrong_arguments_are_refused(change, named):
    arguments = {
        "message": torch.zeros(24, dtype=torch.uint8),
        "rows": torch.zeros(2, 16),
        "segments": [0, 2, 4, 0, 16],
        "senders": [0, 1],
    }
    for kernel in (ops.unpack_dithered, _reference):
        with pytest.raises(ValueError, match=named):
            kernel(**arguments | RANDOM | change)


def test_opcheck():
    rows = torch.randn(7, 24)
    message, table = encoded(rows, 3)
    arguments = (message, rows, table, [0, KEY], *RANDOM.values())
    torch.library.opcheck(torch.ops.megatron_moe_comp.unpack_dithered.default, arguments)
