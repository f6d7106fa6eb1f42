"""A pool of processes joined by gloo, started once per session, that run functions of tests.

    results = pool.run(function, argument)     # function(rank, argument) on every rank

Functions live in test modules and return picklable values; an exception on one rank fails the test
with that rank's traceback.
"""

import os
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_moe_comp.comm import all_to_all

TIMEOUT_S = 120

PROCESSES = mp.get_context("forkserver")
# Importing Megatron takes each process of a spawned pool 6 s of a core; a fork has it imported.
PROCESSES.set_forkserver_preload(["megatron.training.models.gpt"])


class GlooPool:
    """`size` worker processes with a default gloo group; `setup` runs first on each."""

    def __init__(self, size: int, setup: Callable[[int], None] | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = PROCESSES.Pipe()
            process = PROCESSES.Process(
                target=_serve, args=(rank, size, port, theirs, setup), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._collect()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Returns function(rank, *args) of every rank, in their order."""
        for pipe in self._pipes:
            pipe.send((function, args))
        return self._collect()

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def _collect(self) -> list[Any]:
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT_S):
                self.close()
                raise TimeoutError(f"rank {rank} did not answer in {TIMEOUT_S} s: {failures}")
            failed, result = pipe.recv()
            (failures if failed else results).append(
                f"rank {rank}:\n{result}" if failed else result
            )
        if failures:
            raise AssertionError("\n".join(failures))
        return results


def _serve(rank: int, size: int, port: int, pipe: Any, setup: Callable[[int], None] | None) -> None:
    torch.set_num_threads(1)
    # Fills what torch.empty returns with NaN or the largest integer: a byte never written shows.
    torch.use_deterministic_algorithms(True)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    function: Callable[..., Any] = _start
    args: tuple[Any, ...] = (setup,)
    while True:
        try:
            pipe.send((False, function(rank, *args)))
        except Exception:
            pipe.send((True, traceback.format_exc()))
        try:
            function, args = pipe.recv()
        except EOFError:
            return


def _start(rank: int, setup: Callable[[int], None] | None) -> None:
    dist.init_process_group("gloo")
    if setup:
        setup(rank)


@contextmanager
def watched_all_to_alls(rank: int) -> Iterator[list[int]]:
    """Yields the bytes that this rank hands over for others, of each all-to-all as it begins.

    Those are the input of gloo's collective, or what one exchange sends.
    """
    handed: list[int] = []
    collective, exchange, send = dist.all_to_all_single, all_to_all.exchange, dist.isend

    def collective_spy(output, values, output_split_sizes=None, input_split_sizes=None, **kwargs):
        size = dist.get_world_size()
        even = [len(values) // size] * size
        splits = even if input_split_sizes is None else input_split_sizes
        item_bytes = values[:1].numel() * values.element_size() if len(values) else 0
        handed.append(int(sum(splits) - splits[rank]) * item_bytes)
        return collective(output, values, output_split_sizes, input_split_sizes, **kwargs)

    def exchange_spy(buffer, input_splits, output_splits, group):
        assert buffer.dtype == torch.uint8
        assert buffer.numel() == sum(input_splits)
        assert input_splits[rank] == output_splits[rank] == 0
        handed.append(0)
        received, arrival = exchange(buffer, input_splits, output_splits, group)
        assert received.dtype == torch.uint8
        assert received.numel() == sum(output_splits)
        return received, arrival

    def send_spy(values, *args, **kwargs):
        handed[-1] += values.numel() * values.element_size()
        return send(values, *args, **kwargs)

    with (
        patch.object(dist, "all_to_all_single", collective_spy),
        patch.object(all_to_all, "exchange", exchange_spy),
        patch.object(dist, "isend", send_spy),
    ):
        yield handed
