"""Megatron's own all-to-all token dispatcher, counting what it sends: the dispatcher of none.

N: rows of (token, expert) pairs on one rank before the dispatch, M after it; H: hidden size.
"""

import math
from typing import Any

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_moe_comp.compression.wires import Wire
from megatron_moe_comp.stats.comm_stats import CommStats


class CountedAlltoAllTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """Stock dispatcher that counts the bytes of its all-to-alls and computes nothing of its own.

    It owns the CommStats of its layer.

    The counts come from the splits that the stock code hands to the collective: forward when it
    does, backward when the gradient arrives.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self.stats = CommStats()
        self.padded = False
        """Whether the next dispatch has tokens that are padding, which goes to no expert."""

    def start_pass(self, layer_number: int, *, training: bool) -> None:
        """Prepares the next dispatch: evaluation is not counted."""
        self.stats.counting = training

    @property
    def exactly_top_k(self) -> bool:
        """Whether each token goes to as many experts as --moe-router-topk says."""
        return not (
            self.padded
            or self.config.moe_expert_capacity_factor is not None
            or self.config.moe_router_padding_for_quantization
        )

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        """Returns the rows of each local expert, as stock, and counts the rows of this rank.

        Without a capacity stock takes them for given.
        """
        counts = super().preprocess(routing_map)
        if self.padded and not self.drop_and_pad:
            self._count_out_tokens(routing_map.sum())
        return counts

    def _count_out_tokens(self, num_out_tokens: torch.Tensor) -> None:
        self.num_out_tokens = num_out_tokens
        self._maybe_update_cuda_sync_point("before_permutation_1")

    def token_dispatch(
        self, permutated_local_input_tokens: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns rows [M, H] and probabilities [M] of this rank's experts, as stock does."""
        with self.stats.timed("transfer", permuted_probs.device):
            rows, probs = super().token_dispatch(permutated_local_input_tokens, permuted_probs)
        if self.ep_size > 1:
            sent, received = self._remote_rows(len(permutated_local_input_tokens))
            for before, after in ((permutated_local_input_tokens, rows), (permuted_probs, probs)):
                self._count("dispatch_fwd", sent, before)
                self._count_gradient("dispatch_bwd", received, after)
                self.stats.phases.time_gradient(after, "transfer")
        return rows, probs

    def token_combine(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        """Returns the experts' outputs [N, H] for this rank's tokens, as stock does."""
        with self.stats.timed("transfer", hidden_states.device):
            rows = super().token_combine(hidden_states, *args, **kwargs)
        if self.ep_size > 1:
            sent, received = self._remote_rows(len(rows))
            self._count("combine_fwd", received, hidden_states)
            self._count_gradient("combine_bwd", sent, rows)
            self.stats.phases.time_gradient(rows, "transfer")
        return rows

    def _remote_rows(self, num_rows: int) -> tuple[int, int]:
        """Returns how many of `num_rows` rows leave this rank for others' experts, and come."""
        if self.input_splits is None:  # padded to capacity: every rank gets as many
            return (num_rows - num_rows // self.ep_size,) * 2
        return tuple(
            sum(map(int, splits)) - int(splits[self.ep_rank])
            for splits in (self.input_splits, self.output_splits)
        )

    def _count(self, wire: Wire, num_rows: int, values: torch.Tensor) -> None:
        numbers = num_rows * math.prod(values.shape[1:])
        self.stats.add_bytes(wire, 4 * numbers, values.dtype.itemsize * numbers)
        if values.dim() > 1:
            self.stats.add_rows(wire, num_rows, num_rows, ())

    def _count_gradient(self, wire: Wire, num_rows: int, received: torch.Tensor) -> None:
        if received.requires_grad:
            received.register_hook(lambda grad: self._count(wire, num_rows, grad))
