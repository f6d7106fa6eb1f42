import time

import pytest
import torch

from megatron_moe_comp import phase_times
from megatron_moe_comp.phase_times import PHASES, PhaseTimes

CPU = torch.device("cpu")


class Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(0.05)
        return grad


def test_nothing_is_timed_or_hooked_until_started():
    times = PhaseTimes()
    x = torch.ones(2, requires_grad=True)
    result = Slow.apply(x)
    times.time_gradient(result, "transfer")
    times.time_gradients(result, x, "experts")
    with times.timed("encode", CPU):
        pass
    times.start()
    result.sum().backward()
    assert times.seconds() == dict.fromkeys(PHASES, 0.0)


def test_phases_add_up():
    times = PhaseTimes()
    times.start()
    for _ in range(2):
        with times.timed("encode", CPU):
            time.sleep(0.02)
    with times.timed("decode", CPU):
        pass
    times.on = False
    with times.timed("transfer", CPU):
        pass
    seconds = times.seconds()
    assert seconds["encode"] >= 0.04
    assert 0 < seconds["decode"] < seconds["encode"]
    assert seconds["transfer"] == 0


def test_the_time_of_a_gradient_is_that_of_its_own_node():
    times = PhaseTimes()
    times.start()
    x = torch.ones(2, requires_grad=True)
    first = Slow.apply(x)
    second = Slow.apply(first)
    times.time_gradient(first, "transfer")
    third = Slow.apply(second)
    third.sum().backward()
    assert x.grad.tolist() == [1, 1]
    seconds = times.seconds()
    assert 0.05 <= seconds["transfer"] < 0.1
    assert seconds["encode"] == 0
    assert times.time_gradient(x, "transfer") is None  # a leaf has no node


def test_the_time_of_gradients_is_that_of_all_nodes_between():
    times = PhaseTimes()
    times.start()
    x = torch.ones(2, requires_grad=True)
    source = Slow.apply(x)
    result = Slow.apply(Slow.apply(source))
    times.time_gradients(result, source, "experts")
    Slow.apply(result).sum().backward()
    assert x.grad.tolist() == [1, 1]
    assert 0.1 <= times.seconds()["experts"] < 0.15


def test_a_device_takes_its_own_time(monkeypatch):
    """Events are recorded without waiting, and read later."""
    waits = []

    class Event:
        clock = iter(range(100))

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
