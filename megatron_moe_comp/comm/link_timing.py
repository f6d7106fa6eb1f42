"""Times all-to-alls on the real process group, and makes all ranks see the slowest one's times."""

import os
import time
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from megatron_moe_comp.comm.all_to_all import gather_over_ranks
from megatron_moe_comp.comm.exchange import exchange

Group = dist.ProcessGroup

LONG_S = 0.2
"""A first exchange that takes longer is repeated less often."""
REPEATS, REPEATS_IF_LONG = 7, 2


def start_ranks() -> torch.device:
    """Returns this process's device, after joining the processes that torchrun started."""
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def stop_ranks() -> None:
    """Leaves the processes that `start_ranks` joined."""
    dist.destroy_process_group()


def num_ranks() -> int:
    """Returns how many processes the run has."""
    return dist.get_world_size()


def is_first_rank() -> bool:
    """Returns whether this process is the one that reports."""
    return dist.get_rank() == 0


def group_of_consecutive_ranks(size: int) -> Group:
    """Returns this process's group of `size` consecutive ranks; a collective."""
    group, _ = dist.new_subgroups(size)
    return group


def slowest_times(times: Mapping[str, float]) -> dict[str, float]:
    """Returns the largest of each named time over all processes; a collective."""
    of_ranks = gather_over_ranks(dict(times))
    return {name: max(found[name] for found in of_ranks) for name in times}


def best_seconds(action: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Returns the least time of several runs of `action`, after one that is not timed."""
    best = float("inf")
    for repeat in range(repeats + 1):
        wait_for(device)
        start = time.perf_counter()
        action()
        wait_for(device)
        if repeat:
            best = min(best, time.perf_counter() - start)
    return best


def wait_for(device: torch.device) -> None:
    """Waits until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def exchange_seconds(group: Group, bytes_to: Callable[[int], int], device: torch.device) -> float:
    """Returns the median time of an all-to-all on the group; a collective of all processes.

    Args:
        group: process group.
        bytes_to: bytes that this rank exchanges with a rank of the group, each way; the same seen
            from the other end.
        device: of the messages.
    """
    splits = [bytes_to(rank) for rank in range(dist.get_world_size(group))]
    buffer = torch.zeros(sum(splits), dtype=torch.uint8, device=device)

    def timed() -> float:
        wait_for(device)
        start = time.perf_counter()
        exchange(buffer, splits, splits, group)[1].wait()
        wait_for(device)
        return time.perf_counter() - start

    # All processes must come to the same number of repeats. The first connects and is left out.
    timed()
    longest = slowest_times({"first": timed()})["first"]
    times = sorted(timed() for _ in range(REPEATS_IF_LONG if longest > LONG_S else REPEATS))
    return times[len(times) // 2]


def rank_in(group: Group) -> int:
    """Returns this process's rank in the group."""
    return dist.get_rank(group)
