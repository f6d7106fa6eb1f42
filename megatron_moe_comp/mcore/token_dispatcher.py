"""Megatron's all-to-all token dispatcher, counted (none) or compressed (every other method).

The dispatcher of one layer owns the layer's CommStats. N: rows of (token, expert) pairs on one
rank before the dispatch, M after it; H: hidden size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_moe_comp.comm.all_to_all import Message, Route, compressed_all_to_all, global_rank
from megatron_moe_comp.comm_stats import CommStats
from megatron_moe_comp.compression.codec import Codec
from megatron_moe_comp.compression.codecs.identity import Identity
from megatron_moe_comp.compression.codecs.rq import RandomQuantization
from megatron_moe_comp.compression.random_stream import (
    ForwardPass,
    ForwardPassCounter,
    TrainingStep,
)
from megatron_moe_comp.config import CompressionConfig, Wire

SAMPLE_INTERVAL = 10
"""Iterations from one measurement of the quantization error to the next."""


class CountedAlltoAllTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """Stock dispatcher that counts the bytes of its all-to-alls and computes nothing of its own.

    The counts come from the splits that the stock code hands to the collective: forward when it
    does, backward when the gradient arrives.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self.stats = CommStats()

    def start_pass(self, layer_number: int, *, training: bool) -> None:
        """Prepares the next dispatch: evaluation is not counted."""
        self.stats.counting = training

    def route(self, num_rows: int) -> Route:
        """Returns the way from tokens to experts of the `num_rows` rows being dispatched."""
        if self.input_splits is None:  # padded to capacity: every rank gets as many
            equal = (num_rows // self.ep_size,) * self.ep_size
            return Route(self.ep_group, self.ep_rank, equal, equal)
        return Route(
            self.ep_group, self.ep_rank, _as_ints(self.input_splits), _as_ints(self.output_splits)
        )

    def token_dispatch(
        self, permutated_local_input_tokens: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns rows [M, H] and probabilities [M] of this rank's experts, as stock does."""
        rows, probs = super().token_dispatch(permutated_local_input_tokens, permuted_probs)
        if self.ep_size > 1:
            route = self.route(len(permutated_local_input_tokens))
            for sent, received in (
                (permutated_local_input_tokens, rows),
                (permuted_probs, probs),
            ):
                self._count("dispatch_fwd", route, sent)
                self._count_gradient("dispatch_bwd", route.reversed(), received)
        return rows, probs

    def token_combine(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        """Returns the experts' outputs [N, H] for this rank's tokens, as stock does."""
        rows = super().token_combine(hidden_states, *args, **kwargs)
        if self.ep_size > 1:
            route = self.route(len(rows))
            self._count("combine_fwd", route.reversed(), hidden_states)
            self._count_gradient("combine_bwd", route, rows)
        return rows

    def _count(self, wire: Wire, route: Route, values: torch.Tensor) -> None:
        sent = sum(route.input_splits) - route.input_splits[route.rank]
        numbers = sent * math.prod(values.shape[1:])
        self.stats.add_bytes(wire, 4 * numbers, values.dtype.itemsize * numbers)

    def _count_gradient(self, wire: Wire, route: Route, received: torch.Tensor) -> None:
        if received.requires_grad:
            received.register_hook(lambda grad: self._count(wire, route, grad))


@dataclass(frozen=True)
class DispatchState:
    """What combine needs to know of the dispatch before it."""

    route: Route
    forward_pass: ForwardPass


class CompressedAlltoAllTokenDispatcher(CountedAlltoAllTokenDispatcher):
    """Dispatcher whose four wires go through codecs; all else is stock Megatron's.

    Args:
        compression: which wires, and how.
        step: returns the current training step.
        args: of MoEAlltoAllTokenDispatcher.
        kwargs: of MoEAlltoAllTokenDispatcher.
    """

    def __init__(
        self,
        *args: Any,  # noqa: ANN401
        compression: CompressionConfig,
        step: Callable[[], TrainingStep],
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(*args, **kwargs)
        self._compression = compression
        self._step = step
        self._codec: Codec = RandomQuantization(scale_per=compression.moe_a2a_scale_per)
        self._passes = ForwardPassCounter()
        self._forward_pass: ForwardPass | None = None
        self._layer_number = 0
        self._dispatched: DispatchState | None = None

    def start_pass(self, layer_number: int, *, training: bool) -> None:
        """Gives the next dispatch its place in the training, from which its random bits follow.

        Args:
            layer_number: number of the layer in the model.
            training: False in evaluation.
        """
        super().start_pass(layer_number, training=training)
        self._layer_number = layer_number
        self._forward_pass = self._passes.next(
            self._step(), training=training, with_grad=torch.is_grad_enabled()
        )

    def token_dispatch(
        self, permutated_local_input_tokens: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns rows [M, H] and probabilities [M] of this rank's experts."""
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize(
            "before_ep_alltoall", self.tokens_per_expert
        )
        if self.ep_size == 1:
            return permutated_local_input_tokens, permuted_probs
        assert self._forward_pass is not None, "start_pass() comes before token_dispatch()"
        route = self.route(len(permutated_local_input_tokens))
        self._dispatched = DispatchState(route, self._forward_pass)
        self._forward_pass = None
        return compressed_all_to_all(
            permutated_local_input_tokens,
            permuted_probs,
            route,
            (self._message("dispatch_fwd"), self._message("dispatch_bwd")),
            self.stats,
        )

    def token_combine(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        """Returns the experts' outputs [N, H] for this rank's tokens.

        The further arguments are for the fused dispatchers; like stock's, this one ignores them.
        """
        if self.ep_size == 1:
            return hidden_states
        rows, _ = compressed_all_to_all(
            hidden_states,
            None,
            self._dispatched.route.reversed(),
            (self._message("combine_fwd"), self._message("combine_bwd")),
            self.stats,
        )
        self._dispatched = None
        return rows

    def _message(self, wire: Wire) -> Message:
        config, forward_pass = self._compression, self._dispatched.forward_pass
        compressed = wire in config.moe_a2a_wires
        return Message(
            wire=wire,
            codec=self._codec if compressed else Identity(),
            num_bits=config.moe_a2a_bits,
            random=forward_pass.stream(
                seed=config.moe_a2a_seed or 0,
                rank=global_rank(),
                layer=self._layer_number,
                wire=wire,
            ),
            measure_error=compressed
            and forward_pass.training
            and forward_pass.index == 0
            and forward_pass.iteration % SAMPLE_INTERVAL == 0,
        )


def _as_ints(splits: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(n) for n in splits)
