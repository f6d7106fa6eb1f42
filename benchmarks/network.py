"""Measures training steps on a slow network, which is made of namespaces on this machine.

    python benchmarks/network.py --rates 200mbit,1gbit,none --ranks 2 --methods none,birdmoe,lsh
    python benchmarks/network.py --methods all --routing balanced,real --json rows.json
    python benchmarks/network.py --unshaped --methods none,mxfp8      # no root: loopback, as it is

For each number of ranks and routing one GPT-MoE trains with pretrain_gpt_moe.py on the CPU, in
float32, expert parallel over all ranks, every rank in a namespace whose link has the rate in both
directions (with more than two ranks: at a switch). Methods and rates alternate between iterations,
so that what is compared is of the same run: in each repeat, every method at every rate does one
step that is not counted and --steps that are, in an order that rotates. `none` is Megatron's own
dispatcher, only counted; without a limit it is measured in any case. Building networks needs Linux,
root, `ip` and `tc`. An interrupted run leaves no process and no namespace, and the rows of the
runs that finished.
"""

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from methods import METHODS
from namespaces import PREFIX, Network, NetworkError, burst_bytes, require
from network_rows import Row, Visit, make_row, step_seconds, table, warnings
from network_run import (
    HEAD_SIZE,
    NUM_EXPERTS,
    ROOT,
    TOP_K,
    VOCABULARY,
    RunError,
    plan_visits,
    results,
    started,
    training_flags,
)
from option_lists import names, numbers
from rich.console import Console

from megatron_moe_comp.report.network_results import rate_bits

ROUTINGS = ("balanced", "real")
CORPUS = "data/stdlib"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table per ranks, routing and rate; exits with a message where it cannot."""
    options = parse_options(arguments)
    for number in SIGNALS:
        signal.signal(number, _stop)
    rows: list[Row] = []
    try:
        if not options.unshaped:
            require()
        if options.data == CORPUS:
            prepare = ("-m", "megatron_moe_comp.data.prepare", "--vocab-size", str(VOCABULARY))
            subprocess.run(
                [sys.executable, *prepare, "--output-prefix", CORPUS], cwd=ROOT, check=True
            )
        for ranks in options.ranks:
            for routing in options.routing:
                rows += measure(options, ranks, routing)
                if options.json:
                    _write(options.json, rows)
    except NetworkError as error:
        sys.exit(f"{error}\nWithout such a network, --unshaped measures on the loopback interface.")
    except RunError as error:
        sys.exit(str(error))


def _stop(number: int, _: object) -> None:
    """Ends this process in order; what arrives during that is ignored."""
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options, checked; exits with a message on a bad one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", help="such as 200mbit,1gbit,none (default), of each link")
    parser.add_argument("--ranks", type=numbers, default=[2])
    parser.add_argument("--methods", default="none,bf16,mxfp8,birdmoe,lsh", help="or all")
    parser.add_argument("--routing", type=names(ROUTINGS), default=list(ROUTINGS))
    parser.add_argument("--steps", type=int, default=3, help="that count, each time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--settle", type=int, default=10, help="steps of lsh before all others")
    parser.add_argument("--json", type=Path, metavar="PATH", help="file to write the rows to")
    parser.add_argument("--unshaped", action="store_true", help="no namespaces: loopback")
    parser.add_argument("--data", default=CORPUS, metavar="PREFIX", help="of token files, or mock")
    for name, default in (
        ("hidden-size", 512),
        ("ffn-hidden-size", 512),
        ("num-layers", 4),
        ("seq-length", 256),
        ("micro-batch-size", 8),
        ("num-microbatches", 2),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    try:
        _check(options)
    except (ValueError, argparse.ArgumentTypeError) as error:
        parser.error(str(error))
    return options


def _check(options: argparse.Namespace) -> None:
    """Splits lists and adds `none` to the methods; raises ValueError for what cannot work."""
    default_rates = "none" if options.unshaped else "200mbit,1gbit,none"
    options.rates = list(dict.fromkeys((options.rates or default_rates).split(",")))
    for rate in options.rates:
        rate_bits(rate)
    if options.unshaped and options.rates != ["none"]:
        raise ValueError(
            f"--rates={','.join(options.rates)}: --unshaped limits no rate. Use --rates=none."
        )
    chosen = list(METHODS) if options.methods == "all" else names(METHODS)(options.methods)
    options.methods = ["none", *(name for name in dict.fromkeys(chosen) if name != "none")]
    for ranks in options.ranks:
        if ranks < 2 or NUM_EXPERTS % ranks:
            raise ValueError(
                f"--ranks={ranks}: {NUM_EXPERTS} experts are divided among them. Use 2, 4 or 8."
            )
    if options.hidden_size % HEAD_SIZE:
        raise ValueError(
            f"--hidden-size={options.hidden_size}: an attention head has {HEAD_SIZE} values. Use a "
            f"multiple of {HEAD_SIZE}."
        )
    for name in ("steps", "repeats", "settle"):
        if getattr(options, name) < 1:
            raise ValueError(
                f"--{name}={getattr(options, name)}: nothing would be measured. Use 1 or more."
            )
    if options.data not in ("mock", CORPUS):
        options.data = str(Path(options.data).resolve())
        if not Path(f"{options.data}_train.bin").exists():
            raise ValueError(
                f"--data={options.data}: there is no {options.data}_train.bin. Make it with "
                "python -m megatron_moe_comp.data.prepare, or use --data=mock."
            )
    if options.json and not options.json.resolve().parent.is_dir():
        raise ValueError(f"--json={options.json}: there is no such directory. Create it.")


def measure(options: argparse.Namespace, num_ranks: int, routing: str) -> list[Row]:
    """Trains once with these ranks and this routing; prints tables and returns their rows."""
    visits = plan_visits(
        options.rates, options.methods, options.steps, options.repeats, options.settle
    )
    network: AbstractContextManager[Network | None]
    network = nullcontext() if options.unshaped else Network(num_ranks)
    about = _about(options, num_ranks, routing)
    rows: list[Row] = []
    done: list[Visit] = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}-{os.getpid()}-") as name, network as built:
        directory = Path(name)
        plan = {
            "visits": visits,
            "methods": {method: METHODS[method] for method in options.methods},
            "devices": built.devices if built else None,
            "results": str(directory / "results"),
        }
        (directory / "plan").write_text(json.dumps(plan))
        num_steps = sum(1 + visit["steps"] for visit in visits)
        flags = training_flags(options, num_ranks, routing, num_steps)
        with started(flags, num_ranks, built, directory) as processes:
            for visit in results(processes, directory):
                done.append(visit)
                left = (time.monotonic() - start) * (len(visits) / len(done) - 1)
                _print_progress(f"{len(done)}/{len(visits)}", num_ranks, routing, visit, left)
                if _is_last(visits, len(done) - 1, options.rates):
                    rows += _report(done, visit["rate"], options, about)
        if len(done) < len(visits):
            raise RunError(f"The run ended after {len(done)} of {len(visits)} visits.")
    return rows


def _is_last(visits: Sequence[Visit], index: int, rates: Sequence[str]) -> bool:
    """Returns whether a visit is the last of its rate, and the rate one that was asked for."""
    rate = visits[index]["rate"]
    return rate in rates and all(visit["rate"] != rate for visit in visits[index + 1 :])


def _report(
    visits: Sequence[Visit], rate: str, options: argparse.Namespace, about: Row
) -> list[Row]:
    counted = [visit for visit in visits if visit["repeat"] is not None]
    shaping = {"burst_bytes": None if rate == "none" else burst_bytes(rate)}
    rows = [
        about | make_row(counted, rate, method, options.hidden_size) | shaping
        for method in options.methods
    ]
    console = Console(width=140)
    console.print(table(rows))
    for warning in warnings(rows):
        console.print(f"[yellow]Warning:[/] {warning}", highlight=False)
    return rows


def _print_progress(count: str, ranks: int, routing: str, visit: Visit, left: float) -> None:
    what = f"{visit['method']} at {visit['rate']}"
    repeat = "warming up" if visit["repeat"] is None else f"repeat {visit['repeat'] + 1}"
    seconds = "".join(f" {s:.2f} s" for s in step_seconds(visit))
    print(
        f"[{count}] {ranks} ranks, {routing}, {what}, {repeat}:{seconds}; "
        f"about {left / 60:.0f} min left",
        flush=True,
    )


def _about(options: argparse.Namespace, num_ranks: int, routing: str) -> Row:
    """Returns what all rows of a run have in common."""
    sizes = ("hidden_size", "ffn_hidden_size", "num_layers", "seq_length", "micro_batch_size")
    tokens = options.seq_length * options.micro_batch_size
    congestion = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    cpu_info = Path("/proc/cpuinfo")
    cpus = cpu_info.read_text().split("model name\t: ")[1:] if cpu_info.exists() else []
    return {
        "ranks": num_ranks,
        "routing": routing,
        "unshaped": options.unshaped,
        "steps": options.steps,
        "repeats": options.repeats,
        "model": {size: getattr(options, size) for size in (*sizes, "num_microbatches")}
        | {
            "num_experts": NUM_EXPERTS,
            "top_k": TOP_K,
            "vocabulary": VOCABULARY,
            "tokens_per_rank_and_micro_batch": tokens,
            "tokens_per_rank_and_step": tokens * options.num_microbatches,
        },
        "data": options.data,
        "versions": {name: version(name) for name in ("torch", "megatron-core")}
        | {"python": platform.python_version(), "kernel": platform.release()},
        "congestion_control": congestion.read_text().strip() if congestion.exists() else None,
        "command": shlex.join(sys.argv),
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": f"{os.cpu_count()} x {cpus[0].splitlines()[0] if cpus else platform.processor()}",
    }


def _write(path: Path, rows: Sequence[Row]) -> None:
    """Replaces a JSON file by these rows; it is never half written."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(rows, indent=1) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    main()
