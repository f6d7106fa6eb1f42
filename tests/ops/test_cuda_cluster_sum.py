"""The CUDA kernels of cluster_sum and cluster_broadcast, run on the CPU, against the references."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_comp.ops.cluster_sum import _broadcast_reference, _sum_reference
from tests.cuda_emulation import build
from tests.cuda_emulation.clusters import EmulatedClusters
from tests.cuda_emulation.gpu import GpuClusters
from tests.cuda_emulation.kernels import ROW_TYPES
from tests.ops.cluster_layouts import COUNTS, DTYPES, layout, random_rows, same_bytes

pytestmark = pytest.mark.skipif(build.missing_tool() is not None, reason=str(build.missing_tool()))


@pytest.fixture(
    scope="module",
    params=["forward", "reverse"] + ["gpu"] * torch.cuda.is_available(),
)
def kernels(request):
    """The kernels, with the threads of a block in this order, or compiled where there is a GPU."""
    if request.param == "gpu":
        return GpuClusters()
    return EmulatedClusters(build.emulated("cluster_sum"), request.param == "reverse")


def bits_of(rows):
    """The rows as NumPy array, sharing memory."""
    signed = {2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    return rows.view(signed).numpy().view(ROW_TYPES[name_of(rows.dtype)])


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def check(kernels, counts, rows, values=None, generator=None):
    """Both ops write the bytes of the reference, into memory full of something else."""
    order, offsets = layout(counts, generator)
    if values is None:
        values = random_rows(len(counts), rows.shape[1], rows.dtype, generator)
    arguments = (name_of(rows.dtype), order.numpy(), offsets.numpy())
    for mean in (False, True):
        sums, spread = torch.full_like(values, 7), torch.full_like(rows, 7)
        kernels.cluster_sum(bits_of(rows), bits_of(sums), *arguments, mean)
        assert same_bytes(sums, _sum_reference(rows, order, offsets, mean))
        kernels.cluster_broadcast(bits_of(spread), bits_of(values), *arguments, mean)
        assert same_bytes(spread, _broadcast_reference(values, order, offsets, mean))


# Around the columns of a thread and of a block.
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("hidden", [1, 2, 3, 4, 7, 8, 9, 16, 255, 256, 257, 1024, 2048, 2056])
def test_same_bytes_as_the_reference(kernels, hidden, dtype):
    counts = [3, 0, 1, 4, 5, 0, 8, 2]
    generator = torch.Generator().manual_seed(hidden)
    check(kernels, counts, random_rows(sum(counts), hidden, dtype, generator), None, generator)


@settings(max_examples=60, deadline=None)
@given(
    counts=COUNTS,
    hidden=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_layouts(kernels, counts, hidden, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    check(kernels, counts, random_rows(sum(counts), hidden, dtype, generator), None, generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_special_values(kernels, dtype):
    info = torch.finfo(dtype)
    specials = [0.0, -0.0, info.max, -info.max, info.tiny, -info.tiny / 4, info.eps / 2, 1.0]
    specials += [float("nan"), float("inf"), -float("inf"), 1 + info.eps, 1 / 3, 65504.0, 3.0, -1.0]
    row = torch.tensor(specials, dtype=dtype)
    rows = torch.stack([row.roll(i) for i in range(16)])
    for counts in ([1] * 16, [2, 3, 4, 7], [16]):
        check(kernels, counts, rows, rows[: len(counts)].clone())


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_rows_or_values_at_an_odd_address(kernels, dtype):
    rows, values = random_rows(9, 16, dtype), random_rows(3, 16, dtype)
    odd_rows = torch.cat((rows[0, :1], rows.flatten()))[1:].view(9, 16)
    odd_values = torch.cat((values[0, :1], values.flatten()))[1:].view(3, 16)
    check(kernels, [4, 0, 5], odd_rows, values)
    check(kernels, [4, 0, 5], rows, odd_values)


def test_nothing_to_do(kernels):
    check(kernels, [], torch.empty(0, 8))
    check(kernels, [0, 0, 0], torch.empty(0, 8))
    check(kernels, [2, 1], torch.empty(3, 0))


def test_refuses_more_blocks_than_a_launch_has():
    emulated = EmulatedClusters(build.emulated("cluster_sum"))
    none = np.zeros(1, np.uint32)
    values = np.lib.stride_tricks.as_strided(none, (1 << 32, 1024), (4096, 4))
    rows = np.empty((0, 1024), np.uint32)
    offsets = np.lib.stride_tricks.as_strided(np.zeros(1, np.int64), ((1 << 32) + 1,), (0,))
    with pytest.raises(RuntimeError, match="CUDA error"):
        emulated.cluster_sum(rows, values, "float32", np.empty(0, np.int64), offsets, False)
