"""unpack_dithered's CUDA kernels, run on the CPU by tests/cuda_emulation, against the reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_comp.ops.quantize_pack import _reference as quantize_pack
from megatron_moe_comp.ops.unpack_dithered import _reference as unpack_dithered
from tests.cuda_emulation import build
from tests.cuda_emulation.gpu import GpuKernels
from tests.cuda_emulation.kernels import ROW_TYPES, EmulatedDithering
from tests.ops.low_bit_layouts import assert_same_rows, layout, special_rows

pytestmark = pytest.mark.skipif(build.missing_tool() is not None, reason=str(build.missing_tool()))

RANDOM = (5, 0xFFFFFFFF)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EVERY_WIDTH = [(2, 3), (9, 2), (1, 4), (8, 5), (0, 6), (2, 7), (11, 8)]


@pytest.fixture(scope="module", params=["forward", "reverse"] + ["gpu"] * torch.cuda.is_available())
def kernels(request):
    """The kernels, with the threads of a block in this order, or compiled where there is a GPU."""
    if request.param == "gpu":
        return GpuKernels()
    return EmulatedDithering(build.emulated("unpack_dithered"), request.param == "reverse")


def check(kernels, message, rows, table, senders):
    expected, decoded = torch.full_like(rows, -7.0), torch.full_like(rows, -7.0)
    unpack_dithered(message, expected, table, senders, *RANDOM)
    name = str(rows.dtype).removeprefix("torch.")
    bits = decoded.view(torch.int32 if rows.element_size() == 4 else torch.int16).numpy()
    # The message may begin at any address, too.
    shifted = torch.cat((message[:1], message))[1:].numpy()
    kernels.unpack_dithered(shifted, bits.view(ROW_TYPES[name]), name, table, senders, RANDOM)
    assert_same_rows(decoded, expected)


def senders_of(table, seed=1):
    return [v for i in range(len(table) // 5) for v in ((7 * i + seed) % 2**31, (seed << 31) + i)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 13, 256, 1025, 1032, 8200])
def test_same_rows_as_the_reference(kernels, hidden, dtype):
    table, num_rows, num_bytes = layout(hidden, EVERY_WIDTH, [3])
    generator = torch.Generator().manual_seed(hidden)
    message = torch.randint(0, 256, (num_bytes,), generator=generator, dtype=torch.uint8)
    # Scales of every bit pattern.
    check(kernels, message, torch.empty(num_rows, hidden, dtype=dtype), table, senders_of(table))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_bits", [2, 3, 8])
def test_special_rows(kernels, num_bits, dtype):
    for hidden in (12, 16):
        rows = special_rows(hidden, dtype)
        table, _, num_bytes = layout(hidden, [(len(rows), num_bits)])
        message = torch.zeros(num_bytes, dtype=torch.uint8)
        quantize_pack(rows, None, message, table, 99, *RANDOM, True)
        check(kernels, message, rows, table, [0, 99])


def test_more_segments_than_one_launch_takes(kernels):
    table, num_rows, num_bytes = layout(24, [(i % 4, 2 + i % 7) for i in range(200)], [1])
    message = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
    check(kernels, message, torch.empty(num_rows, 24).bfloat16(), table, senders_of(table))


@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(2, 8)), max_size=6),
    gaps=st.lists(st.integers(0, 17), min_size=1, max_size=3),
    hidden=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=30, deadline=None)
def test_layouts(kernels, sizes, gaps, hidden, dtype, seed):
    table, num_rows, num_bytes = layout(hidden, sizes, gaps)
    rows = torch.randn(num_rows, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)
    message = torch.zeros(num_bytes, dtype=torch.uint8)
    quantize_pack(rows, None, message, table, seed, *RANDOM, True)
    check(kernels, message, rows, table, senders_of(table, seed))


def test_rows_at_an_odd_address(kernels):
    table, num_rows, num_bytes = layout(16, EVERY_WIDTH)
    message = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
    for dtype in DTYPES:
        rows = torch.full((num_rows * 16 + 1,), math.nan, dtype=dtype)[1:].view(num_rows, 16)
        check(kernels, message, rows, table, senders_of(table))
