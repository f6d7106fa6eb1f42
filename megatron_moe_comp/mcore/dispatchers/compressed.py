"""Megatron's all-to-all token dispatcher with its four wires compressed.

N: rows of (token, expert) pairs on one rank before the dispatch, M after it; H: hidden size; P:
ranks of the expert-parallel group.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.moe.moe_utils import maybe_move_tensor_to_cpu

from megatron_moe_comp.comm.all_to_all import (
    Message,
    compressed_all_to_all,
    global_rank,
    nodes_of_ranks,
)
from megatron_moe_comp.comm.routes import Links, Route
from megatron_moe_comp.compression.bit_allocation import allocate_bits, between_nodes, most_loaded
from megatron_moe_comp.compression.random_stream import (
    ForwardPass,
    ForwardPassCounter,
    RandomStream,
    TrainingStep,
)
from megatron_moe_comp.compression.wires import WIRES, Wire
from megatron_moe_comp.mcore.dispatchers.counted import CountedAlltoAllTokenDispatcher
from megatron_moe_comp.options.codec_options import Coding
from megatron_moe_comp.options.config import CompressionConfig, codec_of

SAMPLE_INTERVAL = 10
"""Iterations from one measurement of the quantization error to the next."""


@dataclass(frozen=True)
class DispatchState:
    """What combine needs to know of the dispatch before it."""

    routes: tuple[Route, Route]
    links: Links
    forward_pass: ForwardPass


class CompressedAlltoAllTokenDispatcher(CountedAlltoAllTokenDispatcher):
    """Dispatcher whose four wires go through codecs; all else is stock Megatron's.

    Args:
        compression: which wires, and how.
        step: returns the current training step.
        args: of MoEAlltoAllTokenDispatcher.
        kwargs: of MoEAlltoAllTokenDispatcher.

    Raises:
        ValueError: only rows between nodes are to be compressed, and there are none.
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
        self._codecs = {wire: codec_of(compression, wire) for wire in WIRES}
        self._passes = ForwardPassCounter()
        self._forward_pass: ForwardPass | None = None
        self._layer_number = 0
        self._dispatched: DispatchState | None = None
        self._counts: torch.Tensor | None = None
        self.plain_links = self._links_within(compression.moe_a2a_scope, "--moe-a2a-scope")
        nodes = self._node_of_rank()
        self._nodes = None if nodes is None or nodes.max() == 0 else nodes

    def _node_of_rank(self) -> torch.Tensor | None:
        """Returns the node of each rank of the group, numbered from 0; None if it is not known."""
        per_node = self._compression.moe_a2a_ranks_per_node
        if per_node is None:
            return None
        nodes = torch.tensor(nodes_of_ranks(self.ep_group, per_node))
        return nodes.unique(return_inverse=True)[1]

    def _links_within(self, scope: str, option: str) -> torch.Tensor:
        """Returns which pairs of ranks the scope that an option names leaves out, bool [P, P]."""
        if scope == "all":
            return torch.zeros((self.ep_size, self.ep_size), dtype=torch.bool)
        if scope == "remote":
            return torch.eye(self.ep_size, dtype=torch.bool)
        nodes = self._node_of_rank()
        plain = nodes[:, None] == nodes
        if self.ep_size > 1 and plain.all():
            raise ValueError(
                f"{option}=inter-node: all {self.ep_size} expert-parallel ranks are on one node of "
                f"{self._compression.moe_a2a_ranks_per_node} ranks, so nothing would be "
                f"compressed. Use {option}=remote, or name smaller nodes with "
                "--moe-a2a-ranks-per-node."
            )
        return plain

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

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        """Returns the rows of each local expert and sets what stock's preprocess sets.

        Stock gathers the counts of all ranks and keeps those of its own experts. Load-aware bits
        need all of them, so this gathers as stock does, in one collective, and keeps the rest too.

        Args:
            routing_map: bool [tokens, experts].
        """
        if self.drop_and_pad or self.ep_size == 1:
            return super().preprocess(routing_map)
        own_counts = routing_map.sum(dim=0).long()
        if self.exactly_top_k:
            self.num_out_tokens = routing_map.size(0) * self.config.moe_router_topk
        else:
            self._count_out_tokens(own_counts.sum())
        return self._gather_counts(own_counts, self._extra_counts(routing_map))

    def _gather_counts(self, own_counts: torch.Tensor, extra_counts: torch.Tensor) -> torch.Tensor:
        """Returns the rows of each local expert, and sets the splits, from what each rank sends.

        Args:
            own_counts: int64 [experts], rows that this rank sends to each expert.
            extra_counts: int64 [any], what else every rank must know of this one.
        """
        tp, ep, num_local = self.tp_size, self.ep_size, self.num_local_experts
        counts = (
            gather_from_sequence_parallel_region(
                torch.cat((own_counts, extra_counts)), group=self.tp_ep_group
            )
            .reshape(ep, tp, -1)
            .transpose(0, 1)
        )  # [tp, ep, experts and extra counts]
        self._counts = counts[self.tp_rank]
        first = self.local_expert_indices[0]
        local_counts = counts[:, :, first : first + num_local].contiguous()  # [tp, ep, local]
        received = local_counts.sum(dim=2)
        self.input_splits = own_counts.view(ep, num_local).sum(dim=1)
        self.output_splits = received[self.tp_rank]
        self.output_splits_tp = received.sum(dim=1)
        self._maybe_update_cuda_sync_point("before_ep_alltoall")
        if num_local > 1:
            self.num_global_tokens_per_local_expert = local_counts.view(-1, num_local)
            if not self.config.moe_permute_fusion:
                self._maybe_update_cuda_sync_point("before_permutation_2")
        return local_counts.sum(dim=(0, 1))

    def _extra_counts(self, routing_map: torch.Tensor) -> torch.Tensor:
        """Returns what else every rank must know of this one's rows, int64 [any]."""
        return routing_map.new_empty(0, dtype=torch.int64)

    def _maybe_dtoh_and_synchronize(
        self, point: str, tokens_per_expert: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Moves the counts of all ranks to the CPU together with what stock moves."""
        counts = self._counts
        if point == self.cuda_dtoh_point and counts is not None and counts.is_cuda:
            # The event that stock records after its own copies covers this one, too.
            self.cuda_dtoh_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.cuda_dtoh_stream):
                self._counts = maybe_move_tensor_to_cpu(counts, record_stream=True)
        return super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)

    def _links(self) -> Links:
        """Returns what all ranks send to each other, from the counts they gathered."""
        rows = self._counted_rows()
        return self._with_bits(rows, rows)

    def _counted_rows(self) -> torch.Tensor:
        """Returns how many rows all ranks send to each other's experts, int64 [P, P]."""
        ep, num_local = self.ep_size, self.num_local_experts
        if self.drop_and_pad:
            return torch.full((ep, ep), self.capacity * num_local)
        return self._counts[:, : self.num_experts].reshape(ep, ep, num_local).sum(dim=2)

    def _with_bits(self, rows: torch.Tensor, pairs: torch.Tensor) -> Links:
        forward, backward = self._compression.forward, self._compression.backward
        forward_bits = self._allocated(rows, forward)
        if backward[1:] == forward[1:]:
            return Links(rows, pairs, (forward_bits, forward_bits))
        return Links(rows, pairs, (forward_bits, self._allocated(rows, backward)))

    def _allocated(self, rows: torch.Tensor, coding: Coding) -> torch.Tensor:
        return allocate_bits(
            rows.masked_fill(self.plain_links, 0),
            self._compression.moe_a2a_bit_policy,
            target_bits=coding.bits,
            min_bits=coding.min_bits,
            max_bits=coding.max_bits,
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
        rows, probs, _ = self._dispatch(permutated_local_input_tokens, permuted_probs, None)
        return rows, probs

    def _dispatch(
        self, rows: torch.Tensor, probs: torch.Tensor | None, masks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        routes = self._start_dispatch()
        return self._exchange(rows, probs, masks, routes, ("dispatch_fwd", "dispatch_bwd"))

    def _start_dispatch(self) -> tuple[Route, Route]:
        """Returns the forward and the backward Route of this pass; keeps its state for combine."""
        assert self._forward_pass is not None, "start_pass() comes before token_dispatch()"
        links = self._links()
        routes = links.routes(self.ep_group, self.ep_rank, self.plain_links)
        self._dispatched = DispatchState(routes, links, self._forward_pass)
        self._forward_pass = None
        return routes

    def token_combine(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        """Returns the experts' outputs [N, H] for this rank's tokens.

        The further arguments are for the fused dispatchers; like stock's, this one ignores them.
        """
        if self.ep_size == 1:
            return hidden_states
        forward, backward = self._dispatched.routes
        back = forward.reversed(), backward.reversed()
        rows, *_ = self._exchange(hidden_states, None, None, back, ("combine_fwd", "combine_bwd"))
        self._dispatched = None
        return rows

    def _exchange(
        self,
        rows: torch.Tensor,
        probs: torch.Tensor | None,
        masks: torch.Tensor | None,
        routes: tuple[Route, Route],
        wires: tuple[Wire, Wire],
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        if self._dispatched.forward_pass.index == 0 and self.stats.counting:
            for wire in wires if torch.is_grad_enabled() else wires[:1]:
                self._count_load(wire, rows, self._dispatched.links)
        messages = tuple(map(self._message, wires))
        return compressed_all_to_all(rows, probs, masks, routes, messages, self.stats)

    def _message(self, wire: Wire) -> Message:
        config, forward_pass = self._compression, self._dispatched.forward_pass
        compressed = wire in config.moe_a2a_wires
        return Message(
            wire=wire,
            codec=self._codecs[wire],
            random=self._stream(wire, forward_pass),
            num_pieces=config.moe_a2a_chunks,
            measure_error=compressed and self._is_sample(forward_pass),
        )

    def _stream(self, wire: Wire, forward_pass: ForwardPass) -> RandomStream:
        return forward_pass.stream(
            seed=self._compression.moe_a2a_seed or 0,
            rank=global_rank(),
            layer=self._layer_number,
            wire=wire,
        )

    @staticmethod
    def _is_sample(forward_pass: ForwardPass) -> bool:
        """Whether the pass is one that errors are measured in."""
        is_first = forward_pass.training and forward_pass.index == 0
        return is_first and forward_pass.iteration % SAMPLE_INTERVAL == 0

    def _count_load(self, wire: Wire, like: torch.Tensor, links: Links) -> None:
        """Counts the bytes of the rank that sends or receives most; the way back is the mirror."""
        codec, bits = self._codecs[wire], links.bits[wire.endswith("bwd")]
        uniform = torch.full_like(bits, self._compression.coding(wire).bits)
        loads = [links.pairs * 4 * like.shape[1]]
        loads += [links.code_bytes(b, codec, self.plain_links, like) for b in (uniform, bits)]
        of_nodes = None
        if self._nodes is not None:
            of_nodes = [most_loaded(between_nodes(load, self._nodes)) for load in loads]
        self.stats.add_load(wire, [most_loaded(load) for load in loads], of_nodes)
