"""LSH dispatcher whose rows get gradients of their own, through the experts at their centroid.

Shapes: N rows of this rank, C clusters of them; M rows that arrive; H columns; E experts. Rows
travel cluster by cluster; forward, a centroid stands for them, and their number travels with it.
"""

from functools import partial
from typing import Any

import torch

from megatron_moe_comp.comm.per_row_all_to_all import Resize, per_row_all_to_all
from megatron_moe_comp.comm.routes import Links, Route
from megatron_moe_comp.compression.clustering import Clusters
from megatron_moe_comp.compression.wires import Wire
from megatron_moe_comp.mcore.dispatchers.centroids import ClusteredRows, LshAlltoAllTokenDispatcher


class PerRowLshAlltoAllTokenDispatcher(LshAlltoAllTokenDispatcher):
    """Dispatcher of centroids forward and of every row's gradient backward.

    A row x of centroid c gets the gradient J(c)^T g of its own output gradient g, where the shared
    gradient is J(c)^T times the mean of its cluster's. Experts work on a copy of the centroid for
    each row, so neither they nor the backward wires have fewer rows.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self._num_rows: torch.Tensor | None = None

    def _gather_cluster_counts(
        self, clusters: Clusters, num_per_expert: torch.Tensor
    ) -> torch.Tensor:
        return self._gather_counts(num_per_expert, clusters.num_per_expert)

    def _links(self) -> Links:
        if not self._is_clustering:
            return super()._links()
        centroids = self._counts[:, self.num_experts :]
        shape = (self.ep_size, self.ep_size, self.num_local_experts)
        return self._with_bits(centroids.reshape(shape).sum(dim=2), self._counted_rows())

    def _to_send(self, home: ClusteredRows) -> torch.Tensor:
        return home.rows.index_select(0, home.clusters.order)

    def token_dispatch(
        self, permutated_local_input_tokens: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns for each row its centroid [M, H], and a probability of 1."""
        if not self._is_clustering:
            return super().token_dispatch(permutated_local_input_tokens, permuted_probs)
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize(
            "before_ep_alltoall", self.tokens_per_expert
        )
        (route, _), home = self._start_dispatch(), self._at_home
        sizes = home.clusters.offsets.diff().to(torch.int32)
        # Only the values of the centroids are sent: the rows' gradients are those of the copies.
        rows, sizes = self._exchange_per_row(
            permutated_local_input_tokens,
            (
                lambda _: home.centroids.detach(),
                partial(_copies, num_copies=sum(route.received.pairs)),
            ),
            sizes[:, None].view(torch.uint8),
            route,
            ("dispatch_fwd", "dispatch_bwd"),
        )
        self._num_rows = sizes
        return rows, permuted_probs.new_ones(len(rows))

    def token_combine(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        """Returns for each row the output of its centroid, [N, H], cluster by cluster."""
        if not self._at_home:
            return super().token_combine(hidden_states, *args, **kwargs)
        home, arrived = self._at_home, self._num_rows.view(torch.int32)[:, 0].long()
        sizes = home.clusters.offsets.diff().to(torch.int32)
        rows, _ = self._exchange_per_row(
            hidden_states,
            (
                partial(torch.index_select, dim=0, index=arrived.cumsum(0) - arrived),
                lambda rows, _: _copies(rows, sizes[:, None].view(torch.uint8), len(home.rows)),
            ),
            None,
            self._dispatched.routes[0].reversed(),
            ("combine_fwd", "combine_bwd"),
        )
        self._dispatched = self._num_rows = None
        return rows

    def _exchange_per_row(
        self,
        rows: torch.Tensor,
        resize: tuple[Resize, Resize],
        sizes: torch.Tensor | None,
        route: Route,
        wires: tuple[Wire, Wire],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        links = self._dispatched.links
        per_row = Links(links.pairs, links.pairs, links.bits)
        if self._dispatched.forward_pass.index == 0 and self.stats.counting:
            self._count_load(wires[0], rows, links)
            if torch.is_grad_enabled():
                self._count_load(wires[1], rows, per_row)
        _, row_route = per_row.routes(self.ep_group, self.ep_rank, self.plain_links)
        if wires[0] == "combine_fwd":
            row_route = row_route.reversed()
        messages = tuple(map(self._message, wires))
        return per_row_all_to_all(rows, resize, sizes, (route, row_route), messages, self.stats)

    def _of_clusters(self, home: ClusteredRows, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.index_select(0, home.clusters.offsets[:-1])

    def _of_rows(self, home: ClusteredRows, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.index_select(0, home.clusters.order.argsort())


def _copies(rows: torch.Tensor, sizes: torch.Tensor, num_copies: int) -> torch.Tensor:
    """Returns as many copies of each row as its size, int32 as bytes [rows, 4], says.

    Args:
        rows: [rows, H].
        sizes: see above.
        num_copies: their sum, which the host knows without waiting for the device.
    """
    sizes = sizes.view(torch.int32)[:, 0].long()
    return rows.repeat_interleave(sizes, dim=0, output_size=num_copies)
