"""Adapts the clustering of all layers between iterations, and carries its state in checkpoints."""

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.training.models.gpt import GPTModelConfig

from megatron_moe_comp.comm.all_to_all import sum_over_ranks
from megatron_moe_comp.compression.random_stream import TrainingStep
from megatron_moe_comp.mcore.clustering_state import LshState, Measurement
from megatron_moe_comp.mcore.dispatchers.centroids import LshAlltoAllTokenDispatcher
from megatron_moe_comp.options.config import CompressionConfig
from megatron_moe_comp.training.hooks import after_gradients

CheckpointState = list[dict[str, float]]
"""The state of each layer: the same on all ranks, so that any parallel layout can resume it."""


class LshAdaptation:
    """Updates every layer's `LshState` after each iteration by what all ranks measured.

    Args:
        compression: the options in use.
        step: returns the current training step.
        load: returns the state in the checkpoint that training resumes, or None.
        keep: takes the state that checkpoints are to hold from now on.
    """

    def __init__(
        self,
        compression: CompressionConfig,
        step: Callable[[], TrainingStep],
        load: Callable[[], CheckpointState | None],
        keep: Callable[[CheckpointState], None],
    ) -> None:
        self._compression = compression
        self._step = step
        self._load = load
        self._keep = keep
        self._states: list[LshState] = []
        self._dispatchers: dict[int, LshAlltoAllTokenDispatcher] = {}

    def attach(self, model_config: GPTModelConfig, num_layers: int) -> None:
        """Hooks into the building of the model and the end of every backward pass.

        Args:
            model_config: changed in place.
            num_layers: the highest number that an MoE layer can have.
        """
        if self._compression.moe_a2a_compress != "lsh" or not self._compression.adapts:
            return
        model_config.post_wrap_hooks.append(partial(self.take_charge, num_layers))
        after_gradients(model_config.transformer, self.adapt)

    def take_charge(self, num_layers: int, models: list[MegatronModule]) -> list[MegatronModule]:
        """Returns `models`, whose layers from now on have the states kept here.

        Args:
            num_layers: the highest number that an MoE layer can have.
            models: of this rank.
        """
        loaded = self._load()
        if loaded is None:
            self._states = [LshState.initial(self._compression) for _ in range(num_layers)]
        else:
            self._states = [LshState.resumed(state, self._compression) for state in loaded]
        for layer in (module for model in models for module in model.modules()):
            dispatcher = getattr(layer, "token_dispatcher", None)
            if isinstance(dispatcher, LshAlltoAllTokenDispatcher):
                self._dispatchers[layer.layer_number - 1] = dispatcher
                dispatcher.state = self._states[layer.layer_number - 1]
        return models

    def adapt(self) -> None:
        """Moves all layers on to the next iteration; every rank calls it once per iteration."""
        measured = torch.zeros((len(self._states), len(Measurement._fields)), dtype=torch.float64)
        for layer, dispatcher in self._dispatchers.items():
            measured[layer] = dispatcher.take_measurement()
        iteration = self._step().iteration
        for state, seen in zip(self._states, sum_over_ranks(measured).tolist(), strict=True):
            state.update(Measurement(*seen), iteration, self._compression)
        self._keep([state.state_dict() for state in self._states])
