"""gaussian_*'s CUDA kernels, run on the CPU by tests/cuda_emulation, against the references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_comp.ops.gaussian import _pack_reference, _unpack_reference
from tests.cuda_emulation import build
from tests.cuda_emulation.gpu import GpuKernels
from tests.cuda_emulation.kernels import ROW_TYPES, EmulatedGaussian
from tests.ops.low_bit_layouts import assert_same_rows, layout, special_rows

pytestmark = pytest.mark.skipif(build.missing_tool() is not None, reason=str(build.missing_tool()))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [(3, 2), (0, 3), (9, 3), (1, 4), (18, 4), (2, 2)]


@pytest.fixture(scope="module", params=["forward", "reverse"] + ["gpu"] * torch.cuda.is_available())
def kernels(request):
    """The kernels, with the threads of a block in this order, or compiled where there is a GPU."""
    if request.param == "gpu":
        return GpuKernels()
    return EmulatedGaussian(build.emulated("gaussian"), request.param == "reverse")


def bits_of(rows):
    """The rows as NumPy array, sharing memory; and the name of their type."""
    name = str(rows.dtype).removeprefix("torch.")
    integers = torch.int32 if rows.element_size() == 4 else torch.int16
    return rows.view(integers).numpy().view(ROW_TYPES[name]), name


def check(kernels, rows, table, num_bytes):
    expected, message = (torch.full((num_bytes,), 0xFF, dtype=torch.uint8) for _ in range(2))
    _pack_reference(rows, expected, table)
    kernels.gaussian_pack(*bits_of(rows), message.numpy(), table)
    wrong = (message != expected).nonzero().flatten()
    assert not len(wrong), f"{len(wrong)} of {num_bytes} bytes, the first at {int(wrong[0])}"
    check_decoding(kernels, message, rows, table)


def check_decoding(kernels, message, rows, table):
    expected, decoded = torch.full_like(rows, -7.0), torch.full_like(rows, -7.0)
    _unpack_reference(message, expected, table)
    # The message may begin at any address, too.
    shifted = torch.cat((message[:1], message))[1:]
    kernels.gaussian_unpack(shifted.numpy(), *bits_of(decoded), table)
    assert_same_rows(decoded, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 13, 256, 1025, 2504, 8200])
def test_same_bytes_as_the_references(kernels, hidden, dtype):
    table, num_rows, num_bytes = layout(hidden, SIZES, [3], scale_bytes=2)
    generator = torch.Generator().manual_seed(hidden)
    rows = torch.randn(num_rows, hidden, generator=generator) * 3
    check(kernels, rows.to(dtype), table, num_bytes)
    message = torch.randint(0, 256, (num_bytes,), generator=generator, dtype=torch.uint8)
    check_decoding(kernels, message, rows.to(dtype), table)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_special_rows(kernels, num_bits, dtype):
    for hidden in (12, 16, 40):
        rows = special_rows(hidden, dtype)
        table, _, num_bytes = layout(hidden, [(len(rows), num_bits)], scale_bytes=2)
        check(kernels, rows, table, num_bytes)


def test_more_segments_than_one_launch_takes(kernels):
    sizes = [(i % 4, 2 + i % 3) for i in range(300)]
    table, num_rows, num_bytes = layout(24, sizes, [1], scale_bytes=2)
    check(kernels, torch.randn(num_rows, 24).bfloat16(), table, num_bytes)


@given(
    sizes=st.lists(st.tuples(st.integers(0, 19), st.integers(2, 4)), max_size=6),
    gaps=st.lists(st.integers(0, 17), min_size=1, max_size=3),
    hidden=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=30, deadline=None)
def test_layouts(kernels, sizes, gaps, hidden, dtype, seed):
    table, num_rows, num_bytes = layout(hidden, sizes, gaps, scale_bytes=2)
    rows = torch.randn(num_rows, hidden, generator=torch.Generator().manual_seed(seed))
    check(kernels, rows.to(dtype), table, num_bytes)
