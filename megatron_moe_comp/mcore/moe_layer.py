"""CompressedMoELayer: Megatron's MoE layer with the dispatcher replaced and nothing else."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_moe_comp.compression.random_stream import TrainingStep
from megatron_moe_comp.mcore.dispatchers.centroids import LshAlltoAllTokenDispatcher
from megatron_moe_comp.mcore.dispatchers.compressed import CompressedAlltoAllTokenDispatcher
from megatron_moe_comp.mcore.dispatchers.counted import CountedAlltoAllTokenDispatcher
from megatron_moe_comp.mcore.dispatchers.shared_rows import DedupAlltoAllTokenDispatcher
from megatron_moe_comp.options.config import CompressionConfig
from megatron_moe_comp.stats.comm_stats import CommStats


def _dispatcher_of(compression: CompressionConfig) -> type[CompressedAlltoAllTokenDispatcher]:
    if compression.moe_a2a_compress == "lsh":
        return LshAlltoAllTokenDispatcher
    if compression.moe_a2a_dedup:
        return DedupAlltoAllTokenDispatcher
    return CompressedAlltoAllTokenDispatcher


class CompressedMoELayer(MoELayer):
    """MoE layer whose all-to-all dispatcher is compressed, or with none: counted.

    Args:
        compression: the options; checked against the model's configuration.
        step: returns the current training step.
        args: of MoELayer.
        kwargs: of MoELayer.

    Raises:
        ValueError: an option of the model cannot work with compression.
    """

    def __init__(
        self,
        *args: Any,  # noqa: ANN401
        compression: CompressionConfig,
        step: Callable[[], TrainingStep],
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(*args, **kwargs)
        compression.check_model(self.config)
        self._groups = kwargs.get("pg_collection") or get_default_pg_collection()
        is_alltoall = type(self.token_dispatcher) is MoEAlltoAllTokenDispatcher
        # With none, stock's dispatcher stays if counting would disturb its type or a CUDA graph.
        if is_alltoall and self.config.cuda_graph_impl == "none":
            self.token_dispatcher = self.new_dispatcher(compression, step)

    def new_dispatcher(
        self, compression: CompressionConfig, step: Callable[[], TrainingStep]
    ) -> CountedAlltoAllTokenDispatcher:
        """Returns a dispatcher for this layer that does what the options say."""
        arguments = (self.num_local_experts, self.local_expert_indices, self.config, self._groups)
        if not compression.enabled:
            dispatcher = CountedAlltoAllTokenDispatcher(*arguments)
            if self.shared_expert_overlap:
                dispatcher.set_shared_experts(self.shared_experts)
            return dispatcher
        dispatcher = _dispatcher_of(compression)(*arguments, compression=compression, step=step)
        # Two operations per weight forward, four backward; tensor parallel peers have the rest.
        weights = sum(p.numel() for p in self.experts.parameters()) // self.num_local_experts
        dispatcher.stats.flops_per_row = 6 * weights * self._groups.expt_tp.size()
        return dispatcher

    @property
    def stats(self) -> CommStats | None:
        """The counters of this layer's all-to-alls; None where they are not counted."""
        return getattr(self.token_dispatcher, "stats", None)

    def route(
        self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns probabilities and routing map; padding goes to no expert, and on no wire.

        Stock sends it: nothing that counts depends on what comes back.

        Args:
            hidden_states: [S, B, H].
            padding_mask: bool [S, B], True for padding; None if there is none.
        """
        probs, routing_map = super().route(hidden_states, padding_mask)
        if isinstance(self.token_dispatcher, CountedAlltoAllTokenDispatcher):
            self.token_dispatcher.padded = padding_mask is not None
            if padding_mask is not None:
                padding = padding_mask.reshape(-1, 1)
                probs, routing_map = probs.masked_fill(padding, 0), routing_map & ~padding
        return probs, routing_map

    def routed_experts_compute(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Returns the experts' outputs as stock does; a phase of the statistics.

        Args:
            hidden_states: [M, H], as dispatched.
            probs: [M].
        """
        stats = self.stats
        if stats is None:
            return super().routed_experts_compute(hidden_states, probs)
        with stats.timed("experts", hidden_states.device):
            output, bias = super().routed_experts_compute(hidden_states, probs)
        stats.phases.time_gradients(output, (hidden_states, probs), "experts")
        return output, bias

    def preprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prepares rows for the dispatch, the first step of a pass; see MoELayer.preprocess."""
        if isinstance(self.token_dispatcher, CountedAlltoAllTokenDispatcher):
            self.token_dispatcher.start_pass(self.layer_number, training=self.training)
        return super().preprocess(hidden_states, probs, routing_map)
