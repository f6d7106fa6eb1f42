import time

import pytest
import torch
import torch.distributed as dist

from megatron_moe_comp.comm import link_timing
from megatron_moe_comp.plan import measure
from megatron_moe_comp.plan.shape import Layout, Model, Stack

MODEL = Model((Stack(1, 1, 64),), 64, 128, 128, 8, 2, 2, 1, dtype="float32")
CPU = torch.device("cpu")


def measure_here(rank, ranks_per_node):
    size = dist.get_world_size()
    layout = Layout(size, size, ranks_per_node)
    return measure.measure_machine(MODEL, layout, dist.group.WORLD, CPU, ("rq", "fp8"))


@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_every_rank_measures_the_same_machine(pool, ranks_per_node):
    machines = pool.run(measure_here, ranks_per_node)
    assert all(machine == machines[0] for machine in machines)
    (machine, *_), size = machines, len(machines)
    speeds = [machine.flops, machine.memory_bandwidth]
    speeds += [rate for c in machine.codecs.values() for rate in (c.encode, c.decode)]
    links = ([machine.near] if ranks_per_node > 1 else []) + (
        [machine.far] if size > ranks_per_node else []
    )
    speeds += [link.bandwidth for link in links]
    assert all(0 < speed < float("inf") for speed in speeds)
    assert all(link.latency >= 0 for link in links)
    assert set(machine.codecs) == {"rq", "fp8"}
    # What there is no link for takes no time.
    assert (machine.near.bandwidth == float("inf")) == (ranks_per_node == 1)
    assert (machine.far.bandwidth == float("inf")) == (size <= ranks_per_node)


def slowest(rank):
    return link_timing.slowest_times({"a": float(rank), "b": -float(rank)})


def test_the_slowest_rank_counts(pool):
    found = pool.run(slowest)
    assert all(times == {"a": len(found) - 1.0, "b": 0.0} for times in found)


def count_exchanges(rank):
    """Only rank 1 finds the first exchange long."""
    calls, real = [], link_timing.exchange

    def exchange(*args):
        calls.append(args)
        if rank == 1 and len(calls) == 2:
            time.sleep(1.5 * link_timing.LONG_S)
        return real(*args)

    link_timing.exchange = exchange
    try:
        seconds = link_timing.exchange_seconds(
            dist.group.WORLD, lambda other: 0 if other == rank else 100, CPU
        )
    finally:
        link_timing.exchange = real
    splits = calls[-1][1]
    assert splits == [0 if other == rank else 100 for other in range(dist.get_world_size())]
    return len(calls), seconds


def test_ranks_agree_on_how_often_they_exchange(pool):
    found = pool.run(count_exchanges)
    assert {calls for calls, _ in found} == {2 + link_timing.REPEATS_IF_LONG}
    assert all(seconds > 0 for _, seconds in found)


@pytest.mark.parametrize(
    ("large_s", "small_s", "speed", "fixed"),
    [
        (1.0 + 0.5, 0.1 + 0.5, 100.0, 0.5),
        (1.0, 0.1, 100.0, 0.0),
        (0.5, 0.6, 200.0, 0.0),  # noise
        (1.0, 0.01, 100.0, 0.0),
    ],
)
def test_a_speed_and_a_fixed_time_explain_two_sizes(large_s, small_s, speed, fixed):
    assert measure._speed(100, large_s, 10, small_s) == pytest.approx((speed, fixed))
