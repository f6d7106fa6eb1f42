import gc
import weakref
from itertools import count

import pytest
import torch

from megatron_moe_comp.stats import phase_times
from megatron_moe_comp.stats.phase_times import PHASES, PhaseTimes

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """The host's clock, which stands still but for `Slow` and what a test adds."""
    now = [0.0]
    monkeypatch.setattr(phase_times.time, "perf_counter", lambda: now[0])

    def tick(seconds):
        now[0] += seconds

    return tick


class Slow(torch.autograd.Function):
    """The identity, whose backward takes a second."""

    @staticmethod
    def forward(ctx, x, tick):
        ctx.tick = tick
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.tick(1)
        return grad, None


def test_nothing_is_timed_or_hooked_until_started(clock):
    times = PhaseTimes()
    x = torch.ones(2, requires_grad=True)
    result = Slow.apply(x, clock)
    times.time_gradient(result, "transfer")
    times.time_gradients(result, [x], "experts")
    with times.timed("encode", CPU):
        clock(1)
    times.start()
    result.sum().backward()
    assert times.seconds() == dict.fromkeys(PHASES, 0.0)


def test_phases_add_up(clock):
    times = PhaseTimes()
    times.start()
    for _ in range(2):
        with times.timed("encode", CPU):
            clock(2)
    clock(100)
    with times.timed("decode", CPU):
        clock(1)
    times.on = False
    with times.timed("transfer", CPU):
        clock(1)
    assert times.seconds() == {"encode": 4, "transfer": 0, "decode": 1, "experts": 0}


def test_the_time_of_a_gradient_is_that_of_its_own_node(clock):
    times = PhaseTimes()
    times.start()
    x = torch.ones(2, requires_grad=True)
    first = Slow.apply(x, clock)
    second = Slow.apply(first, clock)
    times.time_gradient(first, "transfer")
    third = Slow.apply(second, clock)
    third.sum().backward()
    assert x.grad.tolist() == [1, 1]
    assert times.seconds() == {"encode": 0, "transfer": 1, "decode": 0, "experts": 0}
    assert times.time_gradient(x, "transfer") is None  # a leaf has no node


def test_the_time_of_gradients_ends_before_what_came_before(clock):
    """As with stock's dispatcher: rows and probabilities arrive by exchanges of their own."""
    times = PhaseTimes()
    times.start()
    x = torch.ones(2, requires_grad=True)
    rows, probs = Slow.apply(x, clock), Slow.apply(x, clock)
    for arrived in (rows, probs):
        times.time_gradient(arrived, "transfer")
    result = Slow.apply(rows, clock) * Slow.apply(Slow.apply(probs, clock), clock)
    times.time_gradients(result, (rows, probs, torch.ones(2)), "experts")
    Slow.apply(result, clock).sum().backward()
    assert x.grad.tolist() == [2, 2]
    assert times.seconds() == {"encode": 0, "transfer": 2, "decode": 0, "experts": 3}


@pytest.mark.parametrize("operation", [torch.exp, lambda x: Slow.apply(x, lambda _: None)])
@pytest.mark.parametrize("backward", [False, True])
def test_what_is_timed_is_freed(operation, backward):
    times = PhaseTimes()
    times.start()
    x = torch.ones(2, requires_grad=True)
    source = x * 2
    result = operation(source)
    times.time_gradient(result, "transfer")
    times.time_gradients(result, [source], "experts")
    if backward:
        result.sum().backward()
    kept = weakref.ref(result), weakref.ref(source)
    del result, source
    gc.collect()
    assert [ref() for ref in kept] == [None, None]


def test_a_device_takes_its_own_time(monkeypatch):
    """Events are recorded without waiting, and read later."""
    waits = []

    class Event:
        clock = count()

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.ms = next(Event.clock)

        def synchronize(self):
            waits.append(self.ms)

        def elapsed_time(self, end):
            return end.ms - self.ms

    monkeypatch.setattr(phase_times.torch.cuda, "Event", Event)
    times, cuda = PhaseTimes(), torch.device("cuda")
    times.start()
    with times.timed("encode", cuda), times.timed("transfer", cuda):
        pass
    assert not waits
    assert times.seconds() == {"encode": 0.003, "transfer": 0.001, "decode": 0, "experts": 0}
    assert times.seconds()["encode"] == 0.003
    assert waits == [2, 3]


@pytest.mark.parametrize("on", [False, True])
def test_phases_are_ranges_of_a_profile(on):
    times = PhaseTimes()
    times.on = on
    with torch.profiler.profile() as profile, times.timed("decode", CPU):
        torch.ones(2).sum()
    (found,) = [event for event in profile.events() if event.name == "moe-a2a/decode"]
    assert "aten::sum" in {child.name for child in found.cpu_children}
