"""Phases of an MoE layer in ranks joined by gloo: what they count, and that they keep nothing."""

import gc
import weakref
from unittest.mock import patch

import pytest

from megatron_moe_comp.stats import phase_times
from tests.mcore.test_moe_layer import compressed, make_config, run

METHODS = {
    "none": {},
    "birdmoe": {},
    "rq in pieces": {"moe_a2a_chunks": 2},
    "birdmoe shared rows": {"moe_a2a_dedup": True},
    "lsh": {},
}


def make_layer(name):
    return compressed(make_config(), name.split()[0], **METHODS[name])


def with_a_clock_of_the_experts(rank, name):
    """The clock stands still but for the experts: 2 seconds forward, 3 backward."""
    layer, now = make_layer(name), [0.0]

    def tick(seconds):
        now[0] += seconds

    layer.experts.register_forward_hook(lambda *_: tick(2))
    layer.experts.register_full_backward_hook(lambda *_: tick(3))
    with patch.object(phase_times.time, "perf_counter", lambda: now[0]):
        run(layer, rank=rank)
        untimed = layer.stats.phases.seconds()
        layer.stats.phases.start()
        run(layer, rank=rank)
    return untimed, layer.stats.phases.seconds()


@pytest.mark.parametrize("name", METHODS)
def test_experts_are_timed_forward_and_backward(megatron_pool, name):
    for untimed, timed in megatron_pool.run(with_a_clock_of_the_experts, name):
        assert not any(untimed.values())
        assert timed == {"encode": 0, "transfer": 0, "decode": 0, "experts": 5}


def phases_that_took_time(rank, name):
    layer = make_layer(name)
    layer.stats.phases.start()
    run(layer, rank=rank)
    return {phase for phase, seconds in layer.stats.phases.seconds().items() if seconds > 0}


@pytest.mark.parametrize("name", METHODS)
def test_every_phase_of_a_method_takes_time(megatron_pool, name):
    expected = {"transfer", "experts"} | (set() if name == "none" else {"encode", "decode"})
    for found in megatron_pool.run(phases_that_took_time, name):
        assert found == expected


def tensors_kept(rank, name):
    """How many results of the dispatcher's steps live on after a timed pass."""
    layer, results = make_layer(name), []
    dispatcher = layer.token_dispatcher

    def watched(step):
        def call(*args, **kwargs):
            found = step(*args, **kwargs)
            tensors = found if isinstance(found, tuple) else (found,)
            results.extend(weakref.ref(t) for t in tensors if t is not None and t.requires_grad)
            return found

        return call

    for step in ("dispatch_preprocess", "token_dispatch", "token_combine", "combine_postprocess"):
        setattr(dispatcher, step, watched(getattr(dispatcher, step)))
    layer.stats.phases.start()
    run(layer, rank=rank)
    gc.collect()
    return len(results), sum(ref() is not None for ref in results)


@pytest.mark.parametrize("name", METHODS)
def test_a_timed_pass_keeps_no_activation(megatron_pool, name):
    for watched, kept in megatron_pool.run(tensors_kept, name):
        assert watched >= 4
        assert kept == 0
