"""The contract of cluster_sum and cluster_broadcast, whichever kernel serves them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_comp.ops import cluster_broadcast, cluster_sum
from megatron_moe_comp.ops.cluster_sum import _broadcast_reference, _sum_reference
from tests.ops.cluster_layouts import COUNTS, DTYPES, layout, random_rows, same_bytes

OPS = torch.ops.megatron_moe_comp
KERNELS = [
    pytest.param((_sum_reference, _broadcast_reference), id="reference"),
    pytest.param((OPS.cluster_sum, OPS.cluster_broadcast), id="op"),
]
SEEDS = st.integers(0, 2**32 - 1)
each_kernel = pytest.mark.parametrize("kernels", KERNELS)
each_mean = pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])


def scalar_sum(rows, order, offsets, mean):
    """One row after the other, added to zero in float32 or float64, rounded once at the end."""
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    sums = torch.zeros(len(offsets) - 1, rows.shape[1], dtype=wide)
    for cluster, total in enumerate(sums):
        members = order[offsets[cluster] : offsets[cluster + 1]].tolist()
        for row in members:
            total += rows[row].to(wide)
        if mean and members:
            total /= torch.tensor(len(members), dtype=wide)
    return sums.to(rows.dtype)


def scalar_broadcast(values, order, offsets, mean):
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    rows = torch.full((len(order), values.shape[1]), math.nan, dtype=values.dtype)
    for cluster, value in enumerate(values):
        members = order[offsets[cluster] : offsets[cluster + 1]].tolist()
        for row in members:
            rows[row] = value.to(wide) / torch.tensor(len(members), dtype=wide) if mean else value
    return rows


@each_kernel
def test_example_of_the_docstring(kernels):
    sum_kernel, broadcast_kernel = kernels
    order, offsets = torch.tensor([0, 2, 3, 1]), torch.tensor([0, 3, 3, 4])
    means = sum_kernel(torch.tensor([[1.0], [2.0], [3.0], [8.0]]), order, offsets, True)
    assert means.tolist() == [[4.0], [0.0], [2.0]]
    spread = broadcast_kernel(means, order, offsets, False)
    assert spread.tolist() == [[4.0], [2.0], [4.0], [4.0]]


@each_kernel
@each_mean
@given(
    counts=COUNTS,
    hidden=st.one_of(st.integers(0, 40), st.sampled_from([511, 512, 513, 1030])),
    dtype=st.sampled_from(DTYPES),
    seed=SEEDS,
)
@settings(max_examples=60, deadline=None)
def test_rows_are_added_one_after_the_other(kernels, mean, counts, hidden, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    order, offsets = layout(counts, generator)
    rows = random_rows(len(order), hidden, dtype, generator)
    sums = kernels[0](rows, order, offsets, mean)
    assert same_bytes(sums, scalar_sum(rows, order, offsets, mean))
    values = random_rows(len(counts), hidden, dtype, generator)
    spread = kernels[1](values, order, offsets, mean)
    assert same_bytes(spread, scalar_broadcast(values, order, offsets, mean))


@each_mean
@given(counts=COUNTS, hidden=st.integers(1, 20), seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_each_is_the_transpose_of_the_other(mean, counts, hidden, seed):
    generator = torch.Generator().manual_seed(seed)
    order, offsets = layout(counts, generator)
    x = torch.randn(len(order), hidden, generator=generator, dtype=torch.float64)
    v = torch.randn(len(counts), hidden, generator=generator, dtype=torch.float64)
    left = (cluster_sum(x, order, offsets, mean=mean) * v).sum()
    right = (x * cluster_broadcast(v, order, offsets, mean=mean)).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-11)


@each_mean
@pytest.mark.parametrize("counts", [[3, 0, 1, 4], [5], [1] * 4, [0, 2, 0]])
def test_gradients(mean, counts):
    order, offsets = layout(counts)
    for op, num_rows in ((cluster_sum, len(order)), (cluster_broadcast, len(counts))):
        x = torch.randn(num_rows, 3, dtype=torch.float64, requires_grad=True)

        def function(x, op=op):
            return op(x, order, offsets, mean=mean)

        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


@each_mean
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(mean, dtype):
    order, offsets = layout([2, 0, 3])
    for grad in (False, True):
        rows = torch.randn(5, 4).to(dtype).requires_grad_(grad)
        torch.library.opcheck(OPS.cluster_sum, (rows, order, offsets, mean))
        values = torch.randn(3, 4).to(dtype).requires_grad_(grad)
        torch.library.opcheck(OPS.cluster_broadcast, (values, order, offsets, mean))


@each_kernel
@each_mean
def test_one_cluster_and_a_cluster_for_each_row(kernels, mean):
    rows, order = torch.randn(9, 5), torch.randperm(9)
    divisor = torch.tensor(9.0) if mean else 1
    whole = kernels[0](rows, order, torch.tensor([0, 9]), mean)
    assert same_bytes(whole, scalar_sum(rows, order, torch.tensor([0, 9]), mean))
    torch.testing.assert_close(whole[0] * divisor, rows.sum(0))
    spread = kernels[1](whole, order, torch.tensor([0, 9]), mean)
    assert torch.equal(spread, (whole / divisor).expand(9, 5))
    alone = kernels[0](rows, order, torch.arange(10), mean)
    assert torch.equal(alone, rows[order])
    assert torch.equal(kernels[1](alone, order, torch.arange(10), mean), rows)


@each_kernel
@each_mean
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [0, 7, 512])
def test_nothing_to_sum(kernels, mean, dtype, hidden):
    none = torch.empty(0, dtype=torch.int64)
    for num_clusters in (0, 1, 40):
        offsets = torch.zeros(num_clusters + 1, dtype=torch.int64)
        sums = kernels[0](torch.empty(0, hidden, dtype=dtype), none, offsets, mean)
        assert torch.equal(sums, torch.zeros(num_clusters, hidden, dtype=dtype))
        assert kernels[1](sums, none, offsets, mean).shape == (0, hidden)


@each_kernel
@each_mean
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_row_stays_in_its_cluster_and_column(kernels, mean, value):
    order, offsets = layout([3, 2, 0, 4])
    rows = torch.randn(9, 6)
    clean = kernels[0](rows, order, offsets, mean)
    rows[order[4], 2] = value
    sums = kernels[0](rows, order, offsets, mean)
    bad = torch.zeros(4, 6, dtype=torch.bool)
    bad[1, 2] = True
    assert torch.equal(~sums.isfinite(), bad)
    assert torch.equal(sums[~bad], clean[~bad])
    spread = kernels[1](sums, order, offsets, mean)
    assert torch.equal(
        (~spread.isfinite()).nonzero(), torch.tensor([[r, 2] for r in sorted(order[3:5].tolist())])
    )


@each_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mean_of_equal_rows(kernels, dtype):
    """It is the row itself as long as the partial sums are exact, see the module's docstring."""
    generator = torch.Generator().manual_seed(0)
    row = random_rows(1, 3000, dtype, generator)
    row = row.where(row.isfinite(), 1.0)
    many = {torch.bfloat16: 1 << 16, torch.float16: 1 << 13}
    counts = [1, 2, 4]
    if dtype in many:
        counts += [*range(3, 40), 100, 257, 1023]
        for count in (many[dtype] - 1, many[dtype]):
            few = row[:, :8].expand(count, 8).contiguous()
            mean = kernels[0](few, torch.arange(count), torch.tensor([0, count]), True)
            assert torch.equal(mean, few[:1])
    for count in counts:
        rows = row.expand(count, -1).contiguous()
        mean = kernels[0](rows, torch.arange(count), torch.tensor([0, count]), True)
        assert torch.equal(mean, row), count
    if dtype not in many:
        rows = row.expand(3, -1).contiguous()
        mean = kernels[0](rows, torch.arange(3), torch.tensor([0, 3]), True)
        assert not torch.equal(mean, row)
        torch.testing.assert_close(mean, row, rtol=torch.finfo(dtype).eps, atol=0)


@each_kernel
def test_minus_zero_becomes_plus_zero(kernels):
    sums = kernels[0](torch.tensor([[-0.0]]), torch.tensor([0]), torch.tensor([0, 1]), True)
    assert same_bytes(sums, torch.tensor([[0.0]]))


GOOD = {
    "rows": torch.zeros(4, 6),
    "values": torch.zeros(2, 6),
    "order": torch.tensor([2, 0, 3, 1]),
    "offsets": torch.tensor([0, 1, 4]),
}


@each_kernel
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rows": torch.zeros(4), "values": torch.zeros(2)}, "(rows|values) must be contiguous"),
        (
            {"rows": torch.zeros(4, 6).int(), "values": torch.zeros(2, 6).int()},
            "(rows|values) must be contiguous float32, bfloat16, float16 or float64",
        ),
        (
            {"rows": torch.zeros(6, 4).T, "values": torch.zeros(6, 2).T},
            "(rows|values) must be contiguous",
        ),
        ({"order": GOOD["order"].int()}, "order must be contiguous int64"),
        ({"order": GOOD["order"][:, None]}, "order must be contiguous int64"),
        ({"order": torch.zeros(8, dtype=torch.int64)[::2]}, "order must be contiguous int64"),
        ({"order": torch.tensor([2, 0, 4, 1])}, "order must be a permutation of 0 to 3"),
        ({"order": torch.tensor([2, 0, -1, 1])}, "order must be a permutation of 0 to 3"),
        ({"order": torch.tensor([2, 0, 0, 1])}, "order must be a permutation of 0 to 3"),
        ({"offsets": GOOD["offsets"].int()}, "offsets must be contiguous int64"),
        ({"offsets": GOOD["offsets"][:0]}, "offsets must be one more than there are clusters"),
        ({"offsets": torch.tensor([1, 1, 4])}, "offsets must be from 0 to 4 and not fall"),
        ({"offsets": torch.tensor([0, 1, 5])}, "offsets must be from 0 to 4 and not fall"),
        ({"offsets": torch.tensor([0, 1, 3])}, "offsets must be from 0 to 4 and not fall"),
        ({"offsets": torch.tensor([0, 5, 4])}, "offsets must be from 0 to 4 and not fall"),
        ({"offsets": torch.tensor([0, -1, 4])}, "offsets must be from 0 to 4 and not fall"),
    ],
)
def test_wrong_tensors_are_refused(kernels, change, named):
    arguments = GOOD | change
    for kernel, first in zip(kernels, ("rows", "values"), strict=True):
        with pytest.raises(ValueError, match=named):
            kernel(arguments[first], arguments["order"], arguments["offsets"], True)


@each_kernel
def test_tensors_that_do_not_belong_together_are_refused(kernels):
    order, offsets = GOOD["order"], GOOD["offsets"]
    with pytest.raises(ValueError, match="order must have one entry for each of the 5 rows"):
        kernels[0](torch.zeros(5, 6), order, offsets, False)
    with pytest.raises(ValueError, match="offsets must be one more than there are clusters"):
        kernels[1](torch.zeros(3, 6), order, offsets, False)
