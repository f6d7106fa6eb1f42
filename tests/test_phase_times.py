import time

import torch

from megatron_moe_comp.phase_times import PHASES, PhaseTimes


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
    result = Slow.apply(torch.ones(2, requires_grad=True))
    times.time_gradient(result, "transfer")
    times.start()
    result.sum().backward()
    assert times.seconds == dict.fromkeys(PHASES, 0.0)
    assert PhaseTimes().timed("encode") is PhaseTimes().timed("decode")


def test_phases_add_up():
    times = PhaseTimes()
    times.start()
    for _ in range(2):
        with times.timed("encode"):
            time.sleep(0.02)
    with times.timed("decode"):
        pass
    assert times.seconds["encode"] >= 0.04
    assert times.seconds["decode"] < times.seconds["encode"]
    assert times.seconds["transfer"] == 0
    times.start()
    assert not any(times.seconds.values())


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
    assert times.seconds["transfer"] >= 0.05
    assert times.seconds["encode"] == 0
    assert PhaseTimes().time_gradient(x, "transfer") is None  # a leaf has no node
