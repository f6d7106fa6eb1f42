from fractions import Fraction
from math import floor
from typing import get_args

import pytest
import torch

from megatron_moe_comp.compression.bit_allocation import (
    POLICIES,
    allocate_bits,
    between_nodes,
    most_loaded,
    variance,
)
from megatron_moe_comp.options.codec_options import BitPolicy

LIMITS = {"min_bits": 2, "max_bits": 8}


def skewed_rows(ranks, factor, *, sends=False, noise=0.0):
    """Rows of ranks of which number 1 receives, and maybe sends, `factor` times the mean."""
    mean = 100_000
    rows = torch.zeros(ranks, ranks, dtype=torch.float64)
    rows[:, 1] = factor * mean / (ranks - 1)
    if sends:
        rows[1] = rows[:, 1]
    rows.fill_diagonal_(0)
    others = rows == 0
    others[1] &= not sends
    others.fill_diagonal_(False)
    others[:, 1] = False
    rest = ranks * mean - rows.sum()
    rows[others] = rest / max(1, int(others.sum()))
    generator = torch.Generator().manual_seed(ranks)
    rows *= 1 + noise * (torch.rand(ranks, ranks, generator=generator) - 0.5)
    return rows.round().long()


def average(rows, bits):
    return (rows * bits).sum().item() / rows.sum().item()


def keeps_within_budget(rows, bits, target):
    """Whether no node exceeds the mean traffic at the target, or what it has at two bits."""
    return all(
        node * len(rows) <= max(target * int(rows.sum()), 2 * load * len(rows))
        for dim in (0, 1)
        for node, load in zip((rows * bits).sum(dim).tolist(), rows.sum(dim).tolist(), strict=True)
    )


def test_names():
    assert set(POLICIES) == set(get_args(BitPolicy))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("ranks", [1, 2, 7])
def test_all_policies(policy, ranks):
    generator = torch.Generator().manual_seed(ranks)
    for rows in (
        torch.zeros(ranks, ranks, dtype=torch.int64),
        torch.randint(0, 100, (ranks, ranks), generator=generator),
        torch.randint(0, 100, (ranks, ranks), generator=generator) * 10**9,
    ):
        bits = allocate_bits(rows, policy, target_bits=5, **LIMITS)
        assert bits.dtype == torch.int64
        assert bits.shape == rows.shape
        assert bits.is_contiguous()
        assert bits.min() >= 2
        assert bits.max() <= 8
        others = rows + torch.full((ranks,), 10**6).diag()
        assert torch.equal(bits, allocate_bits(others, policy, target_bits=5, **LIMITS))


@pytest.mark.parametrize("policy", POLICIES)
def test_even_rows_get_the_target(policy):
    rows = torch.full((6, 6), 100)
    bits = allocate_bits(rows, policy, target_bits=5, **LIMITS)
    assert (bits[~torch.eye(6, dtype=torch.bool)] == 5).all()


def test_proportional_rounds_halves_up_and_clamps():
    # 4 * mean(4, 1) / load: 2.5 and 10 bits.
    rows = torch.tensor([[0, 1], [4, 0]])
    bits = allocate_bits(rows, "proportional", target_bits=4, **LIMITS)
    assert bits.tolist() == [[3, 8], [3, 8]]


def test_proportional_equals_exact_fractions():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        ranks = int(torch.randint(2, 9, (), generator=generator))
        rows = torch.randint(0, 30, (ranks, ranks), generator=generator)
        target = int(torch.randint(2, 9, (), generator=generator))
        bits = allocate_bits(rows, "proportional", target_bits=target, **LIMITS)
        loads = (rows.sum(0) - rows.diagonal()).tolist()
        for d, load in enumerate(loads):
            expected = 8
            if load:
                exact = target * Fraction(sum(loads), ranks) / load
                expected = min(max(floor(exact + Fraction(1, 2)), 2), 8)
            assert bits[:, d].tolist() == [expected] * ranks


@pytest.mark.parametrize("target", [4, 6])
@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize(
    ("ranks", "sends"),
    [(4, False), (8, False), (16, False), (64, False), (8, True), (16, True), (64, True)],
)
def test_optimal_relieves_a_hot_node(ranks, sends, noise, target):
    rows = skewed_rows(ranks, 4, sends=sends, noise=noise)
    bits = {p: allocate_bits(rows, p, target_bits=target, **LIMITS) for p in POLICIES}
    load = {p: most_loaded(rows * bits[p]) for p in POLICIES}
    assert load["optimal"] <= 0.65 * load["uniform"]
    assert average(rows, bits["optimal"]) <= target
    assert keeps_within_budget(rows, bits["optimal"], target)
    # No allocation can be held against one that spends more than its budget.
    if keeps_within_budget(rows, bits["proportional"], target):
        assert variance(rows, bits["optimal"]) <= variance(rows, bits["proportional"]) * (1 + 1e-12)


@pytest.mark.parametrize("target", [4, 6])
def test_optimal_beats_proportional_with_many_ranks(target):
    rows = skewed_rows(64, 4)
    proportional = allocate_bits(rows, "proportional", target_bits=target, **LIMITS)
    assert keeps_within_budget(rows, proportional, target)
    optimal = allocate_bits(rows, "optimal", target_bits=target, **LIMITS)
    assert variance(rows, optimal) < variance(rows, proportional)


# Loads whose proportional bits are whole numbers and use every budget up: target and bits.
EXACT = [(4, (3, 6)), (4, (3, 4, 6)), (3, (2, 6)), (3, (2, 3, 6)), (6, (4, 8, 8))]


@pytest.mark.parametrize(("target", "bits"), EXACT)
@pytest.mark.parametrize("copies", [1, 2, 4, 8])
def test_optimal_is_no_worse_than_proportional_where_that_fits(target, bits, copies):
    loads = torch.tensor([840 // b for b in bits * copies])
    rows = loads.repeat(len(loads), 1).fill_diagonal_(0)
    proportional = allocate_bits(rows, "proportional", target_bits=target, **LIMITS)
    assert proportional[0].tolist() == list(bits * copies)
    assert keeps_within_budget(rows, proportional, target)
    optimal = allocate_bits(rows, "optimal", target_bits=target, **LIMITS)
    assert keeps_within_budget(rows, optimal, target)
    assert variance(rows, optimal) <= variance(rows, proportional) * (1 + 1e-12)


def test_optimal_is_no_worse_than_proportional_on_random_rows():
    generator = torch.Generator().manual_seed(0)
    compared = 0
    for _ in range(400):
        ranks, target = (int(x) for x in torch.randint(3, 7, (2,), generator=generator))
        limits = {"min_bits": 2, "max_bits": min(8, target + 1)}
        popularity = torch.randn(ranks, generator=generator).exp() * 10 + 1
        rows = popularity.long().repeat(ranks, 1).fill_diagonal_(0)
        proportional = allocate_bits(rows, "proportional", target_bits=target, **limits)
        if keeps_within_budget(rows, proportional, target):
            optimal = allocate_bits(rows, "optimal", target_bits=target, **limits)
            assert keeps_within_budget(rows, optimal, target)
            assert variance(rows, optimal) <= variance(rows, proportional) * (1 + 1e-12)
            compared += 1
    assert compared > 20


def test_variance():
    rows = torch.tensor([[5, 2], [49, 5]])
    bits = torch.tensor([[2, 3], [4, 2]])
    assert variance(rows, bits) == pytest.approx(2 / 9 + 49 / 49)
    assert variance(torch.zeros_like(rows), bits) == 0.0


def test_nodes_carry_what_their_ranks_exchange_with_others():
    link_bytes = torch.arange(16).reshape(4, 4)
    nodes = between_nodes(link_bytes, torch.tensor([1, 0, 0, 1]))
    expected = [[5 + 6 + 9 + 10, 4 + 7 + 8 + 11], [1 + 2 + 13 + 14, 0 + 3 + 12 + 15]]
    assert nodes.tolist() == expected
    assert most_loaded(nodes) == 30


def test_most_loaded():
    link_bytes = torch.tensor([[100, 1, 2], [3, 100, 4], [5, 6, 100]])
    assert most_loaded(link_bytes) == 5 + 6
    assert most_loaded(link_bytes.T) == 5 + 6
    assert most_loaded(torch.tensor([[7]])) == 0
