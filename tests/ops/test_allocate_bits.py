import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_comp.ops.allocate_bits import (
    EXCHANGE_RANKS,
    VARIANCES,
    _reference,
    allocate_bits,
)

compiled = pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("megatron_moe_comp::allocate_bits", "CPU"),
    reason="the C++ kernel of allocate_bits is not built",
)
KERNELS = [
    pytest.param(_reference, id="reference"),
    pytest.param(allocate_bits, id="compiled", marks=compiled),
]
each_kernel = pytest.mark.parametrize("allocate", KERNELS)


def crossing(rows):
    return rows - rows.diagonal().diag()


def random_rows(ranks, generator):
    """Rows of one of several kinds: few, even, skewed, sparse, or with hot nodes."""
    kind = torch.randint(5, (), generator=generator)
    shape = (ranks, ranks)
    if kind == 0:
        rows = torch.randint(0, 6, shape, generator=generator)
    elif kind == 1:
        rows = torch.randint(80, 121, shape, generator=generator)
    elif kind == 2:
        rows = (torch.randn(shape, generator=generator) * 2 + 3).exp().long()
    elif kind == 3:
        rows = torch.randint(0, 100, shape, generator=generator)
        rows *= torch.rand(shape, generator=generator) < 0.6
    else:
        rows = torch.randint(50, 150, shape, generator=generator)
        factors = torch.randint(1, 8, (2,), generator=generator)
        rows[:, int(torch.randint(ranks, (), generator=generator))] *= factors[0]
        rows[int(torch.randint(ranks, (), generator=generator))] *= factors[1]
    # What stays must not matter.
    return crossing(rows) + torch.randint(0, 50, (ranks,), generator=generator).diag()


def assert_feasible(rows, bits, target, min_bits, max_bits):
    ranks = len(rows)
    rows = crossing(rows)
    assert bits.dtype == torch.int64
    assert bits.shape == rows.shape
    assert (bits >= min_bits).all()
    assert (bits <= max_bits).all()
    spent = rows * bits
    for dim in (0, 1):
        # A budget, or what the fewest bits need, in units of 1 / ranks.
        allowed = torch.maximum(target * rows.sum(), rows.sum(dim) * min_bits * ranks)
        assert (spent.sum(dim) * ranks <= allowed).all()
    assert spent.sum() <= target * rows.sum()


def unit_variance(bits):
    return 1 / (2 ** (bits.double() - 1) - 1) ** 2


def variance(rows, bits):
    return (crossing(rows) * unit_variance(bits)).sum().item()


class AllChoices:
    """All combinations of bits for the links between some ranks: the optimum by brute force."""

    def __init__(self, ranks, min_bits, max_bits):
        self.ranks, self.min_bits = ranks, min_bits
        s, d = (~torch.eye(ranks, dtype=torch.bool)).nonzero().T
        self.links = s, d
        each = [torch.arange(min_bits, max_bits + 1)] * len(s)
        self.choices = torch.cartesian_prod(*each).view(-1, len(s)).double()
        self.variances = unit_variance(self.choices)
        # Which budgets a link takes from: of its sender, its receiver and everybody.
        nodes = torch.arange(ranks)
        everybody = torch.ones(len(s), 1, dtype=torch.bool)
        self.uses = torch.cat((s[:, None] == nodes, d[:, None] == nodes, everybody), 1).double()

    def least_variance(self, rows, target):
        counts = rows[self.links].double()
        per_bit = counts[:, None] * self.uses
        shares = torch.tensor([1 / self.ranks] * 2 * self.ranks + [1], dtype=torch.float64)
        budgets = target * counts.sum() * shares
        allowed = torch.maximum(budgets, per_bit.sum(0) * self.min_bits)
        possible = (self.choices @ per_bit <= allowed + 1e-6).all(1)
        return (self.variances[possible] @ counts).min().item()


@each_kernel
def test_example_of_the_docstring(allocate):
    rows = torch.tensor([[0, 8, 8], [32, 0, 8], [32, 8, 0]])
    bits = allocate(rows, 4, 2, 8)
    assert bits.tolist() == [[8, 8, 8], [2, 8, 8], [2, 8, 8]]
    assert (rows * bits).sum(0).tolist() == (rows * bits).sum(1).tolist() == [128] * 3


def test_a_bit_saves_at_least_four_times_as_much_as_the_next():
    gains = [a - b for a, b in itertools.pairwise(VARIANCES[2:])]
    assert all(a >= 4 * b for a, b in itertools.pairwise(gains))


@each_kernel
@pytest.mark.parametrize("max_bits", [5, 8])
def test_close_to_the_optimum_of_three_ranks(allocate, max_bits):
    generator = torch.Generator().manual_seed(max_bits)
    choices = AllChoices(3, 2, max_bits)
    ratios = []
    for _ in range(1000 if max_bits == 5 else 50):
        rows = random_rows(3, generator)
        target = int(torch.randint(2, max_bits + 1, (), generator=generator))
        bits = allocate(rows, target, 2, max_bits)
        assert_feasible(rows, bits, target, 2, max_bits)
        if crossing(rows).any():
            ratios.append(variance(rows, bits) / choices.least_variance(rows, target))
    ratios = torch.tensor(ratios, dtype=torch.float64)
    assert ratios.min() > 1 - 1e-9
    # Of 200,000 cases apart from these, the worst was 1.61, the mean below 1.001.
    assert ratios.max() < 1.7
    assert ratios.mean() < 1.001
    assert (ratios < 1 + 1e-9).double().mean() > 0.98


@each_kernel
def test_optimal_for_two_ranks(allocate):
    generator = torch.Generator().manual_seed(0)
    choices = AllChoices(2, 2, 8)
    for _ in range(200):
        rows = random_rows(2, generator)
        target = int(torch.randint(2, 9, (), generator=generator))
        best = choices.least_variance(rows, target)
        assert variance(rows, allocate(rows, target, 2, 8)) == pytest.approx(best)


@each_kernel
@pytest.mark.parametrize("ranks", [2, 3, 8, 24])
def test_even_rows_all_get_the_target(allocate, ranks):
    rows = torch.full((ranks, ranks), 1000)
    off_diagonal = ~torch.eye(ranks, dtype=torch.bool)
    for target in range(2, 9):
        assert (allocate(rows, target, 2, 8)[off_diagonal] == target).all()


@each_kernel
@given(data=st.data(), ranks=st.integers(1, EXCHANGE_RANKS + 4), seed=st.integers(0, 2**31))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_feasible_and_repeatable(allocate, data, ranks, seed):
    min_bits = data.draw(st.integers(2, 8))
    max_bits = data.draw(st.integers(min_bits, 8))
    target = data.draw(st.integers(min_bits, max_bits))
    rows = random_rows(ranks, torch.Generator().manual_seed(seed))
    untouched = rows.clone()
    bits = allocate(rows, target, min_bits, max_bits)
    assert_feasible(rows, bits, target, min_bits, max_bits)
    assert torch.equal(bits, allocate(rows, target, min_bits, max_bits))
    assert torch.equal(rows, untouched)
    transposed = allocate(rows.T, target, min_bits, max_bits)
    assert_feasible(rows, transposed.T, target, min_bits, max_bits)
    no_rows = crossing(rows) == 0
    assert (bits[no_rows] == max_bits).all()


@each_kernel
def test_what_stays_does_not_count(allocate):
    rows = random_rows(6, torch.Generator().manual_seed(3))
    others = rows + torch.arange(6).mul(1000).diag()
    assert torch.equal(allocate(rows, 5, 2, 8), allocate(others, 5, 2, 8))


@each_kernel
@pytest.mark.parametrize("ranks", [0, 1, 2, 5, 20])
def test_no_rows(allocate, ranks):
    rows = torch.zeros(ranks, ranks, dtype=torch.int64)
    assert torch.equal(allocate(rows, 4, 2, 7), torch.full_like(rows, 7))


@each_kernel
@pytest.mark.parametrize(("ranks", "bits"), [(2, 2), (5, 2)])
def test_a_single_link_is_the_most_loaded_and_gets_the_fewest_bits(allocate, ranks, bits):
    rows = torch.zeros(ranks, ranks, dtype=torch.int64)
    rows[1, 0] = 17
    expected = torch.full_like(rows, 8)
    expected[1, 0] = bits
    assert torch.equal(allocate(rows, 4, 2, 8), expected)


@each_kernel
@pytest.mark.parametrize("ranks", [3, 40])
def test_huge_counts(allocate, ranks):
    rows = random_rows(ranks, torch.Generator().manual_seed(1)).clamp(1, 1000) * 10**9
    assert_feasible(rows, allocate(rows, 5, 2, 8), 5, 2, 8)


@each_kernel
def test_equal_limits_and_targets_out_of_reach(allocate):
    rows = random_rows(5, torch.Generator().manual_seed(2)).clamp(min=1)
    off_diagonal = ~torch.eye(5, dtype=torch.bool)
    for target in (0, 1, 4, 9):
        assert (allocate(rows, target, 4, 4) == 4).all()
    assert (allocate(rows, 0, 3, 8)[off_diagonal] == 3).all()
    assert (allocate(rows, 100, 3, 8) == 8).all()


@each_kernel
@pytest.mark.parametrize(
    "rows",
    [
        torch.ones(3, 3),
        torch.ones(3, 3, dtype=torch.int32),
        torch.ones(3, 4, dtype=torch.int64),
        torch.ones(9, dtype=torch.int64),
        torch.ones((), dtype=torch.int64),
    ],
    ids=lambda rows: f"{rows.dtype}{tuple(rows.shape)}",
)
def test_wrong_rows(allocate, rows):
    with pytest.raises(ValueError, match=r"num_rows must be int64 \[P, P\]"):
        allocate(rows, 4, 2, 8)


@each_kernel
@pytest.mark.parametrize(("min_bits", "max_bits"), [(1, 8), (2, 9), (6, 5)])
def test_wrong_bits(allocate, min_bits, max_bits):
    with pytest.raises(ValueError, match=f"<= 8, not {min_bits} and {max_bits}"):
        allocate(torch.ones(2, 2, dtype=torch.int64), 4, min_bits, max_bits)


@compiled
@given(
    ranks=st.integers(1, EXCHANGE_RANKS + 8),
    limits=st.tuples(st.integers(2, 8), st.integers(2, 8)),
    target=st.integers(0, 10),
    factor=st.sampled_from([1, 1, 10**3, 10**7]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_the_kernel_equals_the_reference(ranks, limits, target, factor, seed):
    rows = random_rows(ranks, torch.Generator().manual_seed(seed)) * factor
    # Neither contiguous nor owned.
    args = (rows.repeat(2, 2)[1::2, ::2].T, target, min(limits), max(limits))
    expected, bits = _reference(*args), allocate_bits(*args)
    assert torch.equal(bits, expected), f"{args}: {bits} instead of {expected}"


@compiled
@pytest.mark.parametrize("ranks", [64, 256])
def test_the_kernel_equals_the_reference_on_many_ranks(ranks):
    generator = torch.Generator().manual_seed(ranks)
    popularity = torch.arange(1, ranks + 1).double().pow(-0.8)
    noise = torch.randn(ranks, ranks, generator=generator).mul(0.3).exp()
    rows = (popularity[torch.randperm(ranks, generator=generator)] * noise * 5000).long()
    bits = allocate_bits(rows, 4, 2, 8)
    assert_feasible(rows, bits, 4, 2, 8)
    assert torch.equal(bits, _reference(rows, 4, 2, 8))


def test_opcheck():
    rows = random_rows(5, torch.Generator().manual_seed(0))
    torch.library.opcheck(torch.ops.megatron_moe_comp.allocate_bits, (rows, 5, 2, 8))
