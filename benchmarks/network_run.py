"""One training run of benchmarks/network.py: its visits, its flags, its ranks' processes."""

import argparse
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from methods import LSH, METHODS
from namespaces import INTERFACE, Network
from network_rows import Visit

ROOT = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).resolve().with_name("network_worker.py")
NUM_EXPERTS, TOP_K, HEAD_SIZE = 8, 2, 64
VOCABULARY = 1024
SHOWN_LOG_LINES = 20
PR_SET_PDEATHSIG = 1


class RunError(Exception):
    """A run that ended without results; the message says why."""


def plan_visits(
    rates: Sequence[str], methods: Sequence[str], steps: int, repeats: int, settle: int
) -> list[Visit]:
    """Returns what a run does in turn: methods warm up, then all rates and methods per repeat.

    Links without a limit come first, with `none` at least: what a rate's gain is compared with.
    """

    def visit(repeat: int | None, rate: str, method: str, num_steps: int) -> Visit:
        return {"repeat": repeat, "rate": rate, "method": method, "steps": num_steps}

    visits = [visit(None, "none", m, settle - 1 if LSH in METHODS[m] else 0) for m in methods]
    for repeat in range(repeats):
        first = repeat * len(methods) // repeats
        rotated = [*methods[first:], *methods[:first]]
        visits += [
            visit(repeat, "none", m, steps) for m in rotated if m == "none" or "none" in rates
        ]
        limited = [rate for rate in rates if rate != "none"]
        visits += [visit(repeat, rate, m, steps) for rate in limited for m in rotated]
    return visits


def training_flags(
    options: argparse.Namespace, num_ranks: int, routing: str, num_steps: int
) -> list[str]:
    """Returns the arguments of pretrain_gpt_moe.py."""
    sequences = options.micro_batch_size * options.num_microbatches * num_ranks
    data = ["--mock-data", "--tokenizer-type=NullTokenizer", f"--vocab-size={VOCABULARY}"]
    if options.data != "mock":
        data = [f"--{part}-data-path={options.data}_{part}" for part in ("train", "valid", "test")]
        data += ["--tokenizer-type=SentencePieceTokenizer"]
        data += [f"--tokenizer-model={options.data}_tokenizer.model"]
    text = f"""
        --num-layers {options.num_layers} --hidden-size {options.hidden_size}
        --ffn-hidden-size {options.ffn_hidden_size}
        --num-attention-heads {options.hidden_size // HEAD_SIZE}
        --seq-length {options.seq_length} --max-position-embeddings {options.seq_length}
        --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
        --attention-dropout 0 --hidden-dropout 0
        --num-experts {NUM_EXPERTS} --moe-router-topk {TOP_K} --moe-token-dispatcher-type alltoall
        --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
        --expert-model-parallel-size {num_ranks} --moe-a2a-compress none
        --micro-batch-size {options.micro_batch_size} --global-batch-size {sequences}
        --train-iters {num_steps + 1} --lr 1e-4 --lr-decay-style constant --clip-grad 1.0
        --eval-iters 0 --eval-interval {10**9} --log-interval {10**9} --num-workers 0
    """
    balanced = ["--moe-router-force-load-balancing"] if routing == "balanced" else []
    return [*text.split(), *balanced, *data]


@contextmanager
def started(
    flags: Sequence[str], num_ranks: int, network: Network | None, directory: Path
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Yields the ranks' processes, each in a session of its own, and ends them."""
    processes = []
    # Ports of namespaces are their own.
    master = {
        "MASTER_ADDR": network.addresses[0] if network else "127.0.0.1",
        "MASTER_PORT": "29500" if network else str(_free_port()),
    }
    try:
        for rank in range(num_ranks):
            command = [sys.executable, str(WORKER), str(directory / "plan"), *flags]
            command += ["--data-cache-path", str(directory / "cache")]
            if network:
                command = ["ip", "netns", "exec", network.namespaces[rank], *command]
            with (directory / f"rank{rank}.log").open("w") as log:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=os.environ | _environment(rank, num_ranks, network) | master,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=_end_with_parent,
                )
            processes.append(process)
        yield processes
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _end_with_parent() -> None:
    """Has the kernel end this process when its parent ends, be it killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _environment(rank: int, num_ranks: int, network: Network | None) -> dict[str, str]:
    """Returns what torchrun would set for one rank per node, and the link to use."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "GLOO_SOCKET_IFNAME": INTERFACE if network else "lo",
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def results(processes: Sequence[subprocess.Popen[bytes]], directory: Path) -> Iterator[Visit]:
    """Yields the visits as rank 0 writes them, until all ranks have ended."""
    results = directory / "results"
    results.touch()
    with results.open() as lines:
        running = True
        while running:
            running = any(process.poll() is None for process in processes)
            failures = []
            for rank, process in enumerate(processes):
                if process.returncode:
                    log = (directory / f"rank{rank}.log").read_text(errors="replace")
                    lines_shown = log.splitlines()[-SHOWN_LOG_LINES:]
                    failures += [f"Rank {rank} ended with {process.returncode}:", *lines_shown]
            if failures:
                raise RunError("\n    ".join(failures))
            position = lines.tell()
            while (line := lines.readline()).endswith("\n"):
                position = lines.tell()
                yield json.loads(line)
            lines.seek(position)
            if running:
                time.sleep(0.1)
