"""Clusters of similar rows, and which rows are sent in their place (LSH-MoE, NeurIPS 2024, 3.1).

Shapes: N rows of one rank, grouped by expert; E experts; C clusters, grouped by expert like the
rows; H columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_moe_comp import ops
from megatron_moe_comp.ops.lsh_hash import HASH_BITS, own_keys

_KEY_BITS = HASH_BITS + 1
"""Bits of a key; those above hold the expert."""


@dataclass(frozen=True)
class Clusters:
    """Which rows share a cluster. Clusters are in the order of their experts."""

    order: torch.Tensor
    """int64 [N]: the rows, cluster by cluster."""
    offsets: torch.Tensor
    """int64 [C + 1]: where in `order` each cluster begins, and N."""
    num_per_expert: torch.Tensor
    """int64 [E]: clusters of each expert's rows."""
    row_ends: Sequence[int]
    """[E + 1], on the host: where each expert's rows begin, and N."""
    cluster_ends: Sequence[int]
    """[E + 1], on the host: where each expert's clusters begin, and C."""

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.order)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def assignment(self) -> torch.Tensor:
        """The cluster of each row, int64 [N]."""
        ids = torch.arange(len(self), device=self.order.device)
        ids = ids.repeat_interleave(self.offsets.diff(), output_size=self.num_rows)
        return torch.empty_like(ids).index_copy_(0, self.order, ids)

    def mean(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the centroids [C, H] of rows [N, H]; differentiable."""
        return ops.cluster_sum(rows, self.order, self.offsets, mean=True)

    def broadcast(self, values: torch.Tensor) -> torch.Tensor:
        """Returns for each row its cluster's value, [N, H] of [C, H]; differentiable."""
        return ops.cluster_broadcast(values, self.order, self.offsets)


@dataclass(frozen=True)
class Groups:
    """How many rows each expert has, and which experts' rows may be clustered."""

    num_rows: torch.Tensor
    """int64 [E]."""
    clustered: Sequence[bool]
    """[E]: False for experts whose rows stay alone."""
    total: int
    """N."""

    @cached_property
    def offsets(self) -> torch.Tensor:
        """Where each expert's rows begin, and N: int64 [E + 1]."""
        return torch.nn.functional.pad(self.num_rows.cumsum(0), (1, 0))

    def of_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Returns for each row its expert's value, [N] of [E]."""
        return values.repeat_interleave(self.num_rows, output_size=self.total)

    @cached_property
    def experts(self) -> torch.Tensor:
        """The expert of each row, int64 [N]."""
        return self.of_rows(torch.arange(len(self.num_rows), device=self.num_rows.device))


def cluster(keys: torch.Tensor, groups: Groups) -> Clusters:
    """Returns the clusters of the rows of one expert with equal keys.

    Args:
        keys: int64 [N], as the hash ops give them.
        groups: the rows of each expert.
    """
    if not all(groups.clustered):
        mask = torch.tensor(groups.clustered).to(keys.device, non_blocking=True)
        keys = torch.where(groups.of_rows(mask), keys, own_keys(len(keys), keys.device))
    return _of_sorted_keys(*(groups.experts << _KEY_BITS | keys).sort(stable=True), groups)


def _of_sorted_keys(keys: torch.Tensor, order: torch.Tensor, groups: Groups) -> Clusters:
    is_first = torch.ones_like(keys, dtype=torch.bool)
    is_first[1:] = keys[1:] != keys[:-1]
    begun = torch.nn.functional.pad(is_first.cumsum(0), (1, 0))  # clusters before each row
    ends = begun.index_select(0, groups.offsets)
    # How many clusters there are is a size from here on: the one wait for the device.
    row_ends, cluster_ends = torch.stack((groups.offsets, ends)).tolist()
    starts = is_first.nonzero_static(size=cluster_ends[-1])[:, 0]
    offsets = torch.nn.functional.pad(starts, (0, 1), value=len(keys))
    return Clusters(order, offsets, ends.diff(), row_ends, cluster_ends)


def shuffled(keys: torch.Tensor, groups: Groups, random: torch.Tensor) -> torch.Tensor:
    """Returns the keys dealt anew among the rows of each expert, those of non-finite rows excepted.

    Args:
        keys: int64 [N].
        groups: the rows of each expert.
        random: int64 [N], below 2^32.
    """
    hashed = (keys < 1 << HASH_BITS).nonzero()[:, 0]
    order = (groups.experts[hashed] << 32 | random[hashed]).argsort(stable=True)
    return keys.index_copy(0, hashed, keys[hashed[order]])


def centered(rows: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Returns the rows [N, H] less the mean of their expert's rows."""
    in_order = torch.arange(groups.total, device=rows.device)
    means = ops.cluster_sum(rows, in_order, groups.offsets, mean=True)
    return rows - ops.cluster_broadcast(means, in_order, groups.offsets)


def refined(clusters: Clusters, rows: torch.Tensor, groups: Groups) -> Clusters:
    """Returns the clusters after each row moved to its expert's nearest centroid: a Lloyd step.

    Costs N * C * H / E^2 multiply-adds per expert. A row that is not finite stays.

    Args:
        clusters: the clusters to begin with.
        rows: [N, H].
        groups: the rows of each expert.
    """
    rows = rows.detach().float()
    centroids = clusters.mean(rows)
    half_norms = centroids.square().sum(dim=1) / 2
    assignment = clusters.assignment.clone()
    for expert, is_clustered in enumerate(groups.clustered):
        first_row, last_row = clusters.row_ends[expert : expert + 2]
        first, last = clusters.cluster_ends[expert : expert + 2]
        if first_row == last_row or not is_clustered:
            continue
        # Half the square of the distance, less half that of the row, which no centroid changes.
        distances = half_norms[first:last] - rows[first_row:last_row] @ centroids[first:last].T
        least, nearest = distances.masked_fill_(distances.isnan(), torch.inf).min(dim=1)
        place = assignment[first_row:last_row]
        place.copy_(torch.where(least.isfinite(), nearest + first, place))
    return _of_sorted_keys(*assignment.sort(stable=True), groups)
