"""Token dispatcher that sends a token once to each rank that has experts of it.

Shapes: T tokens, E experts, L experts per rank, H columns. A row is a token on its way to one rank,
a pair is a (row, expert). Pairs are in the order (row, expert) while they travel and in stock's
order (source rank, expert, row) beyond; only their probabilities and a mask of L bits per row
travel, not their copies of the row.
"""

from dataclasses import dataclass
from typing import Any

import torch

from megatron_moe_comp.comm.routes import Links
from megatron_moe_comp.mcore.dispatchers.compressed import CompressedAlltoAllTokenDispatcher


@dataclass(frozen=True)
class _Pairs:
    """Which row each pair that arrived belongs to, in stock's order."""

    row: torch.Tensor
    num_rows: int


class DedupAlltoAllTokenDispatcher(CompressedAlltoAllTokenDispatcher):
    """Dispatcher whose rows cross once per destination rank instead of once per expert.

    The outputs of a row's experts on one rank, which Megatron's experts have already weighted with
    their probabilities, are added up there and come back as one row. The sums are in float32, so
    results equal the stock dispatcher's up to the order of additions.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self._masks: torch.Tensor | None = None
        self._tokens: torch.Tensor | None = None
        self._pairs: _Pairs | None = None

    def _extra_counts(self, routing_map: torch.Tensor) -> torch.Tensor:
        """Returns the rows that this rank sends to each rank, int64 [P]."""
        return self._by_rank(routing_map).any(dim=2).sum(dim=0).long()

    def _by_rank(self, values: torch.Tensor) -> torch.Tensor:
        """Returns [T, E] values as [T, ranks, L]."""
        return values.view(-1, self.ep_size, self.num_local_experts)

    def _links(self) -> Links:
        return self._with_bits(self._counts[:, self.num_experts :], self._counted_rows())

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the rows of all ranks in turn, [rows, H], and the pairs' probabilities [pairs].

        Args:
            hidden_states: [..., H].
            routing_map: bool [T, E].
            probs: [T, E].
        """
        if self.ep_size == 1:
            return super().dispatch_preprocess(hidden_states, routing_map, probs)
        self.hidden_shape, self.probs, self.routing_map = hidden_states.shape, probs, routing_map
        counts = self.preprocess(routing_map)
        # The numbers of pairs and rows are sizes from here on: the one wait for the device.
        self._maybe_update_cuda_sync_point("before_permutation_1")
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_1", counts)
        own_counts = self._counts[self.ep_rank]
        num_pairs, num_rows = (int(n.sum()) for n in own_counts.tensor_split((self.num_experts,)))
        by_rank = self._by_rank(routing_map).transpose(0, 1).flatten(0, 1)  # [ranks * T, L]
        places = by_rank.any(dim=1).nonzero_static(size=num_rows)[:, 0]
        pairs = by_rank.flatten().nonzero_static(size=num_pairs)[:, 0]
        self._tokens, self._masks = places % len(routing_map), by_rank.index_select(0, places)
        rows = hidden_states.reshape(-1, self.hidden_shape[-1]).index_select(0, self._tokens)
        return rows, self._by_rank(probs).transpose(0, 1).flatten().index_select(0, pairs)

    def token_dispatch(
        self, permutated_local_input_tokens: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns rows [M, H] and probabilities [M] of this rank's pairs, in stock's order."""
        if self.ep_size == 1:
            return super().token_dispatch(permutated_local_input_tokens, permuted_probs)
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize(
            "before_ep_alltoall", self.tokens_per_expert
        )
        rows, probs, masks = self._dispatch(
            permutated_local_input_tokens, permuted_probs, _pack_bits(self._masks)
        )
        self._masks = None
        received = self._dispatched.routes[0].received
        bits = _unpack_bits(masks, self.num_local_experts)
        row, expert = bits.nonzero_static(size=sum(received.pairs)).unbind(1)
        rows_from = torch.tensor(received.rows).to(row.device, non_blocking=True)
        source = torch.arange(self.ep_size, device=row.device).repeat_interleave(
            rows_from, output_size=len(rows)
        )
        order = (source[row] * self.num_local_experts + expert).argsort(stable=True)
        self._pairs = _Pairs(row[order], len(rows))
        return rows.index_select(0, self._pairs.row), probs.index_select(0, order)

    def token_combine(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        """Returns for each row sent the sum of its experts' outputs on that rank, [rows, H]."""
        if self.ep_size > 1:
            hidden_states = _sum_by(self._pairs.row, hidden_states, self._pairs.num_rows)
            self._pairs = None
        return super().token_combine(hidden_states, *args, **kwargs)

    def combine_postprocess(self, permutated_local_input_tokens: torch.Tensor) -> torch.Tensor:
        """Returns the MoE layer's output, of the shape of its input: sums over ranks."""
        if self.ep_size == 1:
            return super().combine_postprocess(permutated_local_input_tokens)
        num_tokens = self.hidden_shape[:-1].numel()
        output = _sum_by(self._tokens, permutated_local_input_tokens, num_tokens)
        self._tokens = None
        return output.view(self.hidden_shape)


def _sum_by(index: torch.Tensor, values: torch.Tensor, size: int) -> torch.Tensor:
    """Returns the sums [size, H], added in float32 at least, of values [N, H] of equal index."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    sums = torch.zeros((size, values.shape[1]), dtype=dtype, device=values.device)
    return sums.index_add(0, index, values.to(dtype)).to(values.dtype)


def _pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """Returns a bool mask [N, L] as bits, uint8 [N, ceil(L / 8)]; bit i of byte j is 8j + i."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8))
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.view(len(mask), padded.shape[1] // 8, 8) * weights).sum(2, dtype=torch.uint8)


def _unpack_bits(octets: torch.Tensor, size: int) -> torch.Tensor:
    """Returns the bool mask [N, size] that `_pack_bits` was given."""
    shifts = torch.arange(8, dtype=torch.uint8, device=octets.device)
    return (octets[..., None] >> shifts & 1).flatten(1)[:, :size].bool()
