"""The C++ kernels of cluster_sum and cluster_broadcast against the references, byte for byte."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_comp import ops
from megatron_moe_comp.ops.cluster_sum import _broadcast_reference, _sum_reference
from tests.ops.cluster_layouts import COUNTS, DTYPES, layout, random_rows, same_bytes

OPS = torch.ops.megatron_moe_comp

if not ops.is_compiled("cpu", "cluster_sum"):
    pytest.skip("the C++ kernels are not built: run scripts/setup.sh", allow_module_level=True)


def assert_same_bytes(counts, rows, generator=None):
    order, offsets = layout(counts, generator)
    values = random_rows(len(counts), rows.shape[1], rows.dtype, generator)
    for mean in (False, True):
        sums = OPS.cluster_sum(rows, order, offsets, mean)
        assert same_bytes(sums, _sum_reference(rows, order, offsets, mean))
        for source in (values, sums):
            spread = OPS.cluster_broadcast(source, order, offsets, mean)
            assert same_bytes(spread, _broadcast_reference(source, order, offsets, mean))


@given(
    counts=COUNTS,
    hidden=st.one_of(st.integers(0, 70), st.sampled_from([511, 512, 513, 1024, 1500])),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=200, deadline=None)
def test_layouts(isa, counts, hidden, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    assert_same_bytes(counts, random_rows(sum(counts), hidden, dtype, generator), generator)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(isa, dtype):
    """Overflow, subnormal numbers, ties of the rounding, NaN; alone and added to each other."""
    info = torch.finfo(dtype)
    specials = [0.0, -0.0, info.max, -info.max, info.tiny, -info.tiny / 4, info.smallest_normal * 3]
    specials += [float("nan"), float("inf"), -float("inf"), 1 + info.eps, info.eps / 2, 1.0, 1 / 3]
    row = torch.tensor(specials, dtype=dtype)
    rows = torch.stack([row.roll(i) for i in range(len(row))])
    for counts in ([1] * 14, [2] * 7, [3, 4, 7], [14], [5, 0, 9]):
        assert_same_bytes(counts, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value(isa, dtype):
    rows = torch.arange(1 << 16).to(torch.uint16).view(dtype).view(64, 1024)
    assert_same_bytes([1] * 64, rows)
    assert_same_bytes([3] * 20 + [4], rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "counts", [[700], [1] * 700, [0] * 50 + [1, 0, 650, 49] + [0] * 300, [1, 2] * 230]
)
def test_any_number_of_threads_gives_the_same_bytes(isa, dtype, counts):
    """Very unequal clusters, far more values than one thread takes."""
    rows = random_rows(sum(counts), 256, dtype)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_same_bytes(counts, rows)
    finally:
        torch.set_num_threads(threads)


def test_rows_at_an_odd_address(isa):
    for dtype in DTYPES:
        rows = random_rows(1, 9 * 64 + 1, dtype)[0, 1:].view(9, 64)
        assert_same_bytes([4, 0, 5], rows)
