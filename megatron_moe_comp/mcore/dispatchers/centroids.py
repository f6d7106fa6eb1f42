"""Token dispatcher that sends the centroids of similar rows in their place (LSH-MoE).

Shapes: N rows, of (token, expert) pairs on this rank, grouped by expert; C clusters of them; M
centroids that arrive; H columns; E experts; P ranks of the expert-parallel group.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import permute

from megatron_moe_comp.comm.routes import Links
from megatron_moe_comp.compression.clustering import (
    Clusters,
    Groups,
    centered,
    cluster,
    refined,
    shuffled,
)
from megatron_moe_comp.compression.hash_families import HASHES
from megatron_moe_comp.compression.random_stream import random_words
from megatron_moe_comp.mcore.clustering_state import LshState, max_coordinates
from megatron_moe_comp.mcore.dispatchers.compressed import (
    CompressedAlltoAllTokenDispatcher,
)


@dataclass(frozen=True)
class ClusteredRows:
    """What stays at home while the centroids travel."""

    rows: torch.Tensor
    """[N, H]."""
    probs: torch.Tensor
    """[N]."""
    clusters: Clusters
    centroids: torch.Tensor
    """[C, H]."""


class LshAlltoAllTokenDispatcher(CompressedAlltoAllTokenDispatcher):
    """Dispatcher that clusters each expert's rows, sends centroids, and restores rows at home.

    A row x of centroid c gets p * E(c), or with --moe-lsh-residual=identity p * (E(c) + x - c). Its
    probability p never crosses a wire. The experts work on centroids only.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self.state = LshState.initial(self._compression)
        within = self._links_within(self._compression.moe_lsh_scope, "--moe-lsh-scope")
        own = within[self.ep_rank].repeat_interleave(self.num_local_experts)
        self._clustered = (~own).tolist()
        self._hash = None
        self._is_clustering = False
        self._at_home: ClusteredRows | None = None
        self._rows_seen = self._centroids_seen = 0

    def start_pass(self, layer_number: int, *, training: bool) -> None:
        """See CompressedAlltoAllTokenDispatcher; rows are clustered in training, or on request."""
        super().start_pass(layer_number, training=training)
        self._is_clustering = self.ep_size > 1 and (training or self._compression.moe_lsh_eval)

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the centroids of each expert in turn, [C, H], and ones, [C].

        Args:
            hidden_states: [..., H].
            routing_map: bool [T, E].
            probs: [T, E].
        """
        if not self._is_clustering:
            return super().dispatch_preprocess(hidden_states, routing_map, probs)
        self.hidden_shape, self.probs, self.routing_map = hidden_states.shape, probs, routing_map
        tokens = hidden_states.reshape(-1, self.hidden_shape[-1])
        self.hidden_shape_before_permute = tokens.shape
        num_per_expert = routing_map.sum(dim=0).long()
        self.num_out_tokens = (
            len(tokens) * self.config.moe_router_topk
            if self.exactly_top_k
            else int(num_per_expert.sum())
        )
        rows, row_probs, self.reversed_local_input_permutation_mapping, *_ = permute(
            tokens,
            routing_map,
            probs=probs,
            num_out_tokens=self.num_out_tokens,
            fused=self.config.moe_permute_fusion,
        )
        groups = Groups(num_per_expert, self._clustered, len(rows))
        with self.stats.timed("encode", rows.device):
            clusters = self._cluster(rows, groups)
            centroids = clusters.mean(rows)
        self.stats.phases.time_gradient(centroids, "encode")
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize(
            "before_permutation_1", self._gather_cluster_counts(clusters, num_per_expert)
        )
        self._at_home = ClusteredRows(rows, row_probs, clusters, centroids)
        self._count_clusters(groups)
        return centroids, row_probs.new_ones(len(centroids))

    def _gather_cluster_counts(
        self, clusters: Clusters, num_per_expert: torch.Tensor
    ) -> torch.Tensor:
        """Returns the rows of each local expert; every rank learns clusters and rows of all."""
        rows_per_rank = num_per_expert.view(self.ep_size, self.num_local_experts).sum(dim=1)
        return self._gather_counts(clusters.num_per_expert, rows_per_rank)

    @torch.no_grad()
    def _cluster(self, rows: torch.Tensor, groups: Groups) -> Clusters:
        """Returns the clusters of rows [N, H]."""
        config, forward_pass = self._compression, self._forward_pass
        if self._hash is None:
            self._hash = HASHES[config.moe_lsh_hash](
                rows.shape[1],
                max_coordinates(config),
                config.moe_lsh_hash_dim,
                seed=config.moe_a2a_seed or 0,
                layer=self._layer_number,
            )
        hashed = centered(rows, groups) if config.moe_lsh_center else rows
        keys = self._hash.keys(hashed, self.state.num_coordinates)
        if config.moe_lsh_hash == "random":
            stream = self._stream("dispatch_fwd", forward_pass)
            keys = shuffled(keys, groups, random_words(stream, len(rows), rows.device))
        clusters = cluster(keys, groups)
        for _ in range(config.moe_lsh_refine):
            clusters = refined(clusters, rows, groups)
        return clusters

    def _count_clusters(self, groups: Groups) -> None:
        """Counts rows and centroids, for the statistics and the next iteration's granularity."""
        home, forward_pass = self._at_home, self._forward_pass
        if not forward_pass.training or forward_pass.recomputed:
            return
        ends = zip(pairwise(home.clusters.row_ends), groups.clustered, strict=True)
        alone = sum(end - begin for (begin, end), is_clustered in ends if not is_clustered)
        num_rows, num_centroids = groups.total - alone, len(home.clusters) - alone
        self._rows_seen += num_rows
        self._centroids_seen += num_centroids
        self.stats.add_clusters(num_rows, num_centroids)
        if self._is_sample(forward_pass):
            with torch.no_grad():
                mean_rows = home.clusters.broadcast(home.centroids)
                self.stats.add_residual(home.rows, mean_rows)

    def _links(self) -> Links:
        if not self._is_clustering:
            return super()._links()
        return self._with_bits(self._counted_rows(), self._counts[:, self.num_experts :])

    def token_dispatch(
        self, permutated_local_input_tokens: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the centroids [M, H] for this rank's experts, and a probability of 1 for each."""
        if not self._is_clustering:
            return super().token_dispatch(permutated_local_input_tokens, permuted_probs)
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize(
            "before_ep_alltoall", self.tokens_per_expert
        )
        centroids, *_ = self._dispatch(permutated_local_input_tokens, None, None)
        return centroids, permuted_probs.new_ones(len(centroids))

    def combine_postprocess(self, permutated_local_input_tokens: torch.Tensor) -> torch.Tensor:
        """Returns the MoE layer's output, of the shape of its input, from the outputs [C, H]."""
        if self._at_home is None:
            return super().combine_postprocess(permutated_local_input_tokens)
        home, outputs = self._at_home, permutated_local_input_tokens
        self._at_home = None
        with self.stats.timed("decode", outputs.device):
            restored = home.clusters.broadcast(outputs)
            self.stats.phases.time_gradient(restored, "decode")
            if self._compression.moe_lsh_residual == "identity":
                restored = restored + (home.rows - home.clusters.broadcast(home.centroids))
            restored = (restored * home.probs[:, None]).to(outputs.dtype)
        return super().combine_postprocess(restored)

    def take_measurement(self) -> torch.Tensor:
        """Returns what this rank measured since the last call, a `Measurement` as float64 [2]."""
        counts = torch.tensor([self._rows_seen, self._centroids_seen], dtype=torch.float64)
        self._rows_seen = self._centroids_seen = 0
        return counts
