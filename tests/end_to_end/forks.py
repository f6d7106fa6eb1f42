"""Ranks of an entry script as forks of a process that has Megatron imported.

Importing it takes each rank that torchrun starts 6 s of a core.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from dataclasses import dataclass

import torch

from tests.gloo import PROCESSES

TIMEOUT_S = 240
GRACE_S = 20
"""How long the others may go on after a rank has failed."""


@dataclass(frozen=True)
class Rank:
    """How a rank ended; a negative code is the signal that ended it."""

    returncode: int
    output: str


def fork_ranks(script, arguments, ranks, directory):
    """Returns how each Rank of a run in `directory` ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [directory / f"rank{rank}.log" for rank in range(ranks)]
    processes = [
        PROCESSES.Process(
            target=_be_rank, args=(rank, ranks, port, directory, log, script, arguments)
        )
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + TIMEOUT_S
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + GRACE_S)
        time.sleep(0.05)
    for process in processes:
        process.kill()
        process.join()
    return [
        Rank(process.exitcode, log.read_text() if log.exists() else "")
        for process, log in zip(processes, logs, strict=True)
    ]


def launch(script, arguments, ranks, directory):
    """Returns 0 or a failed rank's exit status, and what all ranks printed."""
    ended = fork_ranks(script, arguments, ranks, directory)
    failures = [rank.returncode for rank in ended if rank.returncode]
    return (failures or [0])[0], "\n".join(rank.output for rank in ended)


def _be_rank(rank, ranks, port, directory, log, script, arguments):
    with log.open("w") as stream:
        os.dup2(stream.fileno(), sys.stdout.fileno())
        os.dup2(stream.fileno(), sys.stderr.fileno())
    os.chdir(directory)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    torch.set_num_threads(1)
    # Data loaders' workers are forks, as they are of a rank that torchrun starts.
    multiprocessing.set_start_method("fork", force=True)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")
