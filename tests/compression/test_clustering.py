from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_comp.compression.clustering import (
    Groups,
    centered,
    cluster,
    refined,
    shuffled,
)
from megatron_moe_comp.ops.lsh_hash import own_keys

LARGEST_KEY = (1 << 48) - 1
COLUMNS = 8


def distinct_rows(groups):
    return torch.arange(groups.total, dtype=torch.float32)[:, None]


def make_groups(sizes, clustered=None):
    return Groups(torch.tensor(sizes), clustered or [True] * len(sizes), sum(sizes))


@st.composite
def layouts(draw):
    """Groups, and keys and rows of them: few different keys, some rows not finite."""
    sizes = draw(st.lists(st.integers(0, 12), min_size=1, max_size=5))
    groups = make_groups(sizes, [draw(st.booleans()) for _ in sizes])
    kinds = draw(st.integers(1, 6))
    choices = [0, LARGEST_KEY, *range(1, 5)][:kinds]
    keys = [draw(st.sampled_from(choices)) for _ in range(groups.total)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    rows = torch.randn(groups.total, COLUMNS, generator=generator)
    keys = torch.tensor(keys, dtype=torch.int64)
    for row in range(groups.total):
        if draw(st.integers(0, 9)) == 0:
            value = draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
            rows[row, draw(st.integers(0, COLUMNS - 1))] = value
            keys[row] = own_keys(groups.total, keys.device)[row]
    return groups, keys, rows


def members(clusters):
    """Returns the rows of each cluster."""
    ends = clusters.offsets.tolist()
    return [clusters.order[a:b].tolist() for a, b in pairwise(ends)]


def partition(clusters):
    return {frozenset(rows) for rows in members(clusters)}


def sets_of_equals(labels):
    sets = {}
    for row, label in enumerate(labels):
        sets.setdefault(label, set()).add(row)
    return {frozenset(rows) for rows in sets.values()}


def expert_of_rows(groups):
    return [e for e, n in enumerate(groups.num_rows.tolist()) for _ in range(n)]


def assert_consistent(clusters, groups):
    """Every row is in one cluster, clusters are in the order of experts, and none is empty."""
    assert sorted(clusters.order.tolist()) == list(range(groups.total))
    assert clusters.offsets[0] == 0
    assert clusters.offsets[-1] == groups.total == clusters.num_rows
    assert (clusters.offsets.diff() > 0).all()
    experts = expert_of_rows(groups)
    of_clusters = []
    for rows in members(clusters):
        assert len({experts[row] for row in rows}) == 1
        of_clusters.append(experts[rows[0]])
    assert of_clusters == sorted(of_clusters)
    counts = [of_clusters.count(e) for e in range(len(groups.num_rows))]
    assert clusters.num_per_expert.tolist() == counts
    assert len(clusters) == len(of_clusters)
    for number, rows in enumerate(members(clusters)):
        assert clusters.assignment[rows].tolist() == [number] * len(rows)
    tensors = (clusters.order, clusters.offsets, clusters.num_per_expert, clusters.assignment)
    assert all(t.dtype == torch.int64 for t in tensors)


@given(layouts())
def test_clusters_are_the_rows_of_one_expert_with_equal_keys(layout):
    groups, keys, _ = layout
    clusters = cluster(keys, groups)
    assert_consistent(clusters, groups)
    experts = expert_of_rows(groups)
    labels = [
        (experts[row], key if groups.clustered[experts[row]] else f"row {row}")
        for row, key in enumerate(keys.tolist())
    ]
    assert partition(clusters) == sets_of_equals(labels)
    assert all(rows == sorted(rows) for rows in members(clusters))


@pytest.mark.parametrize("sizes", [[0], [0, 0, 0], [1], [0, 1, 0]])
def test_no_row_or_one(sizes):
    groups = make_groups(sizes)
    clusters = cluster(torch.zeros(sum(sizes), dtype=torch.int64), groups)
    assert_consistent(clusters, groups)
    rows = torch.randn(sum(sizes), COLUMNS)
    assert torch.equal(clusters.mean(rows), rows)
    assert torch.equal(clusters.broadcast(rows), rows)
    assert torch.equal(refined(clusters, rows, groups).offsets, clusters.offsets)


def test_all_rows_equal_or_all_different():
    groups = make_groups([3, 0, 4])
    assert cluster(torch.full((7,), 5), groups).num_per_expert.tolist() == [1, 0, 1]
    assert cluster(torch.arange(7), groups).num_per_expert.tolist() == [3, 0, 4]


@given(layouts())
def test_mean_and_broadcast_equal_a_loop(layout):
    groups, keys, rows = layout
    clusters = cluster(keys, groups)
    means = clusters.mean(rows)
    assert means.shape == (len(clusters), COLUMNS)
    spread = clusters.broadcast(means)
    for number, of_cluster in enumerate(members(clusters)):
        mean = rows[of_cluster].double().mean(dim=0).float()
        torch.testing.assert_close(means[number], mean, equal_nan=True)
        for row in of_cluster:
            assert torch.equal(spread[row].isnan(), means[number].isnan())
            assert torch.equal(spread[row].nan_to_num(), means[number].nan_to_num())


@given(layouts(), st.integers(0, 1000))
def test_shuffling_keeps_the_sizes_of_each_experts_clusters(layout, seed):
    groups, keys, _ = layout
    random = torch.randint(2**32, keys.shape, generator=torch.Generator().manual_seed(seed))
    dealt = shuffled(keys, groups, random)
    first = 0
    for number in groups.num_rows.tolist():
        rows = slice(first, first + number)
        assert torch.equal(keys[rows].sort().values, dealt[rows].sort().values)
        first += number
    not_finite = keys > LARGEST_KEY
    assert torch.equal(keys[not_finite], dealt[not_finite])
    alone = partition(cluster(dealt, groups))
    assert all({row} in alone for row in not_finite.nonzero()[:, 0].tolist())


def test_other_random_numbers_deal_other_clusters():
    groups = make_groups([32, 32])
    keys = torch.arange(64) % 4
    draws = torch.randint(2**32, (2, 64), generator=torch.Generator().manual_seed(1))
    dealt = [partition(cluster(shuffled(keys, groups, random), groups)) for random in draws]
    again = partition(cluster(shuffled(keys, groups, draws[0]), groups))
    assert dealt[0] != dealt[1]
    assert dealt[0] == again
    assert partition(cluster(keys, groups)) not in dealt


@pytest.mark.parametrize("sizes", [[0], [5], [0, 3, 0, 1, 6]])
def test_centered_rows_have_no_mean(sizes):
    groups = make_groups(sizes)
    rows = 10 + torch.randn(sum(sizes), COLUMNS, dtype=torch.float64)
    expected = [part - part.mean(dim=0) for part in rows.split(sizes)]
    torch.testing.assert_close(centered(rows, groups), torch.cat(expected))


def distances(rows, clusters):
    """Returns the squared distance of finite rows to their centroids; 0 for others."""
    wide = rows.double()
    spread = torch.empty_like(wide)
    for of_cluster in members(clusters):
        spread[of_cluster] = wide[of_cluster].mean(dim=0)
    return (wide - spread).square().sum(dim=1).nan_to_num(nan=0, posinf=0)


@given(layouts())
@settings(max_examples=200)
def test_refining_moves_rows_to_the_nearest_centroid_of_their_expert(layout):
    groups, keys, rows = layout
    before = cluster(keys, groups)
    after = refined(before, rows, groups)
    assert_consistent(after, groups)
    experts = expert_of_rows(groups)
    finite = rows.isfinite().all(dim=1).tolist()
    centroids = [rows[of_cluster].double().mean(dim=0) for of_cluster in members(before)]
    of_centroid = [experts[of_cluster[0]] for of_cluster in members(before)]
    labels = []
    for row, expert in enumerate(experts):
        to = {
            c: (rows[row].double() - centroid).square().sum().item()
            for c, centroid in enumerate(centroids)
            if of_centroid[c] == expert and centroid.isfinite().all()
        }
        moves = finite[row] and groups.clustered[expert]
        labels.append(min(to, key=to.get) if moves else before.assignment[row].item())
    assert partition(after) == sets_of_equals(labels)
    assert all({row} in partition(after) for row, is_finite in enumerate(finite) if not is_finite)
    assert distances(rows, after).sum() <= distances(rows, before).sum() + 1e-5


@given(st.lists(st.integers(0, 3), min_size=2, max_size=24), st.integers(0, 1000))
def test_refining_brings_equal_rows_together(kinds, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(4, COLUMNS, generator=generator)[kinds]
    groups = make_groups([len(kinds)])
    keys = torch.randint(3, (len(kinds),), generator=generator)
    after = refined(cluster(keys, groups), rows, groups).assignment
    for kind in set(kinds):
        assert len(after[torch.tensor(kinds) == kind].unique()) == 1
