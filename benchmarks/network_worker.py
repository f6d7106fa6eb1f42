"""One rank of benchmarks/network.py: trains with pretrain_gpt_moe.py, changing method and rate.

    network_worker.py PLAN [any pretrain_gpt_moe.py arguments]

The model, the optimizer, the data and Megatron's loop are of one run; between iterations every MoE
layer gets the token dispatcher of the next method, and the links the next rate. Each method counts
the iterations that it trained in, so that what it does only in some of them, or adapts after each,
happens as in a run of its own.
"""

import json
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from megatron.training.models.gpt import GPTModelConfig
from namespaces import sent_bytes, set_rate

import pretrain_gpt_moe
from megatron_moe_comp.comm.all_to_all import gather_over_ranks
from megatron_moe_comp.compression.random_stream import TrainingStep
from megatron_moe_comp.mcore.dispatchers.counted import CountedAlltoAllTokenDispatcher
from megatron_moe_comp.mcore.moe_layer import CompressedMoELayer
from megatron_moe_comp.options.config import CompressionConfig
from megatron_moe_comp.stats.comm_stats import Column
from megatron_moe_comp.stats.phase_times import PHASES
from megatron_moe_comp.training import arguments
from megatron_moe_comp.training.clustering_adaptation import LshAdaptation

Step = dict[str, Any]


def main() -> None:
    """Trains as pretrain_gpt_moe.py does, and measures what the plan says."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    sys.argv = ["pretrain_gpt_moe.py", *sys.argv[2:]]
    run = pretrain_gpt_moe.run
    run.train = partial(_train, plan, run.train)
    pretrain_gpt_moe.main()


def _train(
    plan: dict[str, Any],
    train: Callable[..., None],
    args: Namespace,
    compression: CompressionConfig,
    model_config: GPTModelConfig,
    layer_names: list[str],
    datasets_provider: Callable[..., Any],
    forward_step: Callable[..., Any],
) -> None:
    """Calls `train` with a forward step and a model that are measured."""
    methods = {name: _parse(flags, args) for name, flags in plan["methods"].items()}
    measurement = Measurement(plan, methods, len(layer_names))
    model_config.post_wrap_hooks.append(partial(measurement.attach, model_config))
    watched = measurement.watched(forward_step)
    train(args, compression, model_config, layer_names, datasets_provider, watched)


def _parse(flags: list[str], args: Namespace) -> CompressionConfig:
    """Returns the options that flags ask for, checked against Megatron's arguments."""
    parsed = arguments.add_compression_args(ArgumentParser()).parse_args(flags)
    return arguments.compression_config_from_args(Namespace(**vars(args) | vars(parsed)))


class Measurement:
    """Carries out the visits of a plan, one method at one rate each, and writes what it saw.

    Args:
        plan: see network.py.
        methods: options by name.
        num_layers: of the model.
    """

    def __init__(
        self, plan: dict[str, Any], methods: dict[str, CompressionConfig], num_layers: int
    ) -> None:
        self._plan, self._methods, self._num_layers = plan, methods, num_layers
        self._iterations = dict.fromkeys(methods, 0)
        self._method = next(iter(methods))
        self._layers: list[CompressedMoELayer] = []
        self._dispatchers: dict[str, list[CountedAlltoAllTokenDispatcher]] = {}
        self._adaptations: dict[str, LshAdaptation] = {}
        self._tokens_per_expert: list[torch.Tensor] = []
        self._steps = self._carry_out()
        self._iteration: int | None = None
        self._is_discarded = False
        self._sent_by_layers = 0

    def watched(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a forward step that comes here first in each iteration."""

        def step(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            iteration = arguments.current_step().iteration
            if iteration != self._iteration:
                self._iteration = iteration
                next(self._steps)
            return forward_step(*args, **kwargs)

        return step

    def attach(
        self, model_config: GPTModelConfig, models: list[MegatronModule]
    ) -> list[MegatronModule]:
        """Returns `models`; makes the dispatchers of all methods and hooks into the layers."""
        modules = (module for model in models for module in model.modules())
        self._layers = [m for m in modules if isinstance(m, CompressedMoELayer)]
        for layer in self._layers:
            layer.router.register_forward_hook(self._count_tokens)
        for name, compression in self._methods.items():
            step = partial(self._step, name)
            self._dispatchers[name] = [
                layer.new_dispatcher(compression, step) for layer in self._layers
            ]
            self._install(name)
            if compression.enabled and compression.adapts:
                adaptation = LshAdaptation(compression, step, lambda: None, lambda _: None)
                adaptation.take_charge(self._num_layers, models)
                self._adaptations[name] = adaptation
        transformer = model_config.transformer
        transformer.finalize_model_grads_func = partial(
            self._finalize_model_grads, transformer.finalize_model_grads_func
        )
        return models

    def _count_tokens(self, _: MegatronModule, __: Any, routed: tuple[torch.Tensor, ...]) -> None:  # noqa: ANN401
        self._tokens_per_expert.append(routed[1].sum(dim=0))

    def _step(self, method: str) -> TrainingStep:
        return replace(arguments.current_step(), iteration=self._iterations[method])

    def _install(self, method: str) -> None:
        self._method = method
        for layer, dispatcher in zip(self._layers, self._dispatchers[method], strict=True):
            layer.token_dispatcher = dispatcher

    def _finalize_model_grads(
        self,
        finalize: Callable[..., None],
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        if self._is_discarded:
            dist.barrier()
            self._sent_by_layers = self._sent()
        finalize(*args, **kwargs)
        if self._method in self._adaptations:
            self._adaptations[self._method].adapt()

    def _sent(self) -> int:
        return sent_bytes() if self._plan["devices"] else 0

    def _carry_out(self) -> Iterator[None]:
        """Yields where Megatron is to train for an iteration; ends the run after the last."""
        for visit in self._plan["visits"]:
            self._install(visit["method"])
            if self._plan["devices"]:
                set_rate(self._plan["devices"][dist.get_rank()], visit["rate"])
            steps = []
            for number in range(1 + visit["steps"]):
                self._is_discarded = number == 0
                before = self._begin_step()
                yield
                steps.append(self._end_step(before))
                self._iterations[self._method] += 1
            ranks = gather_over_ranks(steps)
            if dist.get_rank() == 0:
                with Path(self._plan["results"]).open("a") as results:
                    results.write(json.dumps(visit | {"ranks": ranks}) + "\n")
        sys.exit(0)

    def _begin_step(self) -> Step:
        self._tokens_per_expert.clear()
        for dispatcher in self._dispatchers[self._method]:
            dispatcher.stats.phases.start()
        counters = self._counters()
        dist.barrier()
        return {"sent": self._sent(), **counters, "start": time.perf_counter()}

    def _end_step(self, before: Step) -> Step:
        """Returns what one step took and counted on this rank."""
        dist.barrier()
        seconds, sent = time.perf_counter() - before["start"], self._sent()
        after = self._counters()
        return {
            "seconds": seconds,
            "phases": _difference(after["phases"], before["phases"]),
            "counts": _difference(after["counts"], before["counts"]),
            "interface_bytes": sent - before["sent"],
            "layers_interface_bytes": self._sent_by_layers - before["sent"]
            if self._is_discarded
            else None,
            "tokens_per_expert": torch.stack(self._tokens_per_expert).tolist(),
        }

    def _counters(self) -> dict[str, dict[str, float]]:
        """Returns the seconds by phase, and the columns of CommStats, summed over layers."""
        stats = [dispatcher.stats for dispatcher in self._dispatchers[self._method]]
        seconds = [s.phases.seconds() for s in stats]
        phases = {phase: sum(of_layer[phase] for of_layer in seconds) for phase in PHASES}
        sums = sum(s.totals() for s in stats).sum(dim=0).tolist()
        return {"phases": phases, "counts": dict(zip(Column.__members__, sums, strict=True))}


def _difference(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {name: value - before[name] for name, value in after.items()}


if __name__ == "__main__":
    main()
