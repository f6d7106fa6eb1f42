"""Measures what compression costs in quality: trains the default model for settings x seeds.

    python benchmarks/quality.py --results runs/quality             # 8 settings, 3 seeds, hours
    python benchmarks/quality.py --results runs/short --settings none,lsh-20 --seeds 1,2 --iters 600
    python benchmarks/quality.py --results runs/quality-1000 --from-checkpoint 1000 --iters 400
    python benchmarks/quality.py --results runs/mine -- --train-data-path data/mine_train ...

Settings are those of benchmarks/methods.py. Each run is scripts/run_local.sh on the CPU, 2 ranks,
the flags of its setting, and any flags after "--" (other data, another model), evaluated once, at
its end. Runs of one seed have the same initial weights and data in the same order.
DIR/SETTING-seedS.log is its output, DIR/SETTING-seedS.json its results with the curve of its
training loss; a run with results is not repeated, so the same command goes on where it was stopped.

With --from-checkpoint N, seed S first trains N iterations without compression, in which the
learning rate falls to 1e-4. Every setting goes on from there at that rate, with the optimizer's
state and the data that would have followed. Iterations go on counting from N, so a warm-up would be
over before it started: settings with one are left out.

The yardstick comes first in what it prints: how far apart the seeds of uncompressed training end.
`python -m megatron_moe_comp.report DIR` draws the curves, with network.py's rows also against time.
"""

import argparse
import json
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from methods import METHODS, WARMS_UP
from readme_tables import table_of_runs
from training_runs import launch, parse_curve, parse_losses

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = ("bash", str(ROOT / "scripts" / "run_local.sh"))
ENVIRONMENT = {"RANKS": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TIMEOUT_SECONDS, SHOWN_LOG_LINES = 7200.0, 15

SETTINGS = ("none", *(f"birdmoe-{bits}" for bits in (8, 6, 5, 4, 3)), "lsh-20", "lsh-10")
"""What is trained unless --settings says otherwise."""

Results = dict[tuple[str, int], dict[str, Any]]
"""By setting and seed: what the run's file holds."""


@dataclass(frozen=True)
class Run:
    """One training run."""

    setting: str
    seed: int
    iterations: int
    last_iteration: int
    setting_flags: tuple[str, ...]
    checkpoint_flags: tuple[str, ...] = ()
    """Where a checkpoint is written or read; not part of the results."""

    @property
    def name(self) -> str:
        """Stem of its files."""
        return f"{self.setting}-seed{self.seed}"

    @property
    def flags(self) -> list[str]:
        """What determines its results, beside scripts/run_local.sh."""
        # An interval that ends within the run would only evaluate the same model twice.
        schedule = [f"--train-iters={self.last_iteration}", f"--eval-interval={10**9}"]
        return [f"--seed={self.seed}", "--log-interval=20", *schedule, *self.setting_flags]


class RunError(Exception):
    """A run that ended without results; the message says why."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what has no results yet and prints the table; exits with 1 if a run failed."""
    options = parse_options(arguments)
    directory = options.results.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    # Lets the processes of a run be ended when this one is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    runs = plan(options, directory)
    results = {(run.setting, run.seed): r for run in runs if (r := read_results(run, directory))}
    failed = [] if options.table_only else train_all(runs, results, directory)
    start = f" from a checkpoint after {options.from_checkpoint}" if options.from_checkpoint else ""
    print(f"\nValidation perplexity after {options.iters} iterations{start}.")
    print(yardstick(results), end="\n\n")
    print(table_of_runs(results.values()), flush=True)
    if failed:
        sys.exit(f"\n{len(failed)} failed: {', '.join(failed)}")


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options, lists split and `none` first; exits with a message on a bad one."""

    def seeds(text: str) -> list[int]:
        return [int(seed) for seed in text.split(",")]

    def settings(text: str) -> list[str]:
        names = list(METHODS) if text == "all" else text.split(",")
        if unknown := [name for name in names if name not in METHODS]:
            raise argparse.ArgumentTypeError(
                f"{unknown[0]}: not one of {', '.join(METHODS)}. Choose some of these, or all."
            )
        return sorted(names, key=lambda name: name != "none")

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seeds", type=seeds, default=[1, 2, 3])
    parser.add_argument("--iters", type=int, default=2000, help="of every setting")
    parser.add_argument("--settings", type=settings, default=list(SETTINGS))
    parser.add_argument("--from-checkpoint", type=int, default=0, metavar="ITERS")
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="of every run")
    options = parser.parse_args(arguments)
    if options.from_checkpoint:
        options.settings = [name for name in options.settings if name not in WARMS_UP]
    return options


def plan(options: argparse.Namespace, directory: Path) -> list[Run]:
    """Returns the runs in their order: all settings of the first seed, then of the next."""
    start = options.from_checkpoint
    # Beyond the last iteration of its decay the learning rate stays what it is.
    further = ("--min-lr=1e-4", f"--lr-decay-iters={start}") if start else ()
    further += tuple(options.flags)
    runs: list[Run] = []
    for seed in options.seeds:
        path = directory / f"checkpoint-seed{seed}"
        save = ("--ckpt-format=torch", f"--save={path}", f"--save-interval={start}")
        # Overriding: Megatron refuses to load the schedule of a run of another length.
        load = ("--ckpt-format=torch", f"--load={path}", "--override-opt-param-scheduler")
        if start:
            runs.append(Run("checkpoint", seed, start, start, further + METHODS["none"], save))
        for name in options.settings:
            flags, last = further + METHODS[name], start + options.iters
            runs.append(Run(name, seed, options.iters, last, flags, load if start else ()))
    return runs


def train_all(runs: Sequence[Run], results: Results, directory: Path) -> list[str]:
    """Trains every run that is not in `results`, adds it there, and returns who failed."""
    failed: list[str] = []
    for number, run in enumerate(runs, start=1):
        if (run.setting, run.seed) in results:
            continue
        print(f"[{number}/{len(runs)}] {run.name}: ", end="", flush=True)
        try:
            if f"checkpoint-seed{run.seed}" in failed:
                raise RunError("has no checkpoint to go on from")
            result = results[run.setting, run.seed] = train(run, directory)
        except RunError as error:
            failed.append(run.name)
            print(f"FAILED, {error}", flush=True)
        else:
            perplexity, seconds = result["validation_perplexity"], result["seconds"]
            print(f"perplexity {perplexity:.2f}, {seconds:.0f} s", flush=True)
    return failed


def train(run: Run, directory: Path) -> dict[str, Any]:
    """Trains and evaluates; returns the results and writes them to the run's file."""
    log_path, stats_path = directory / f"{run.name}.log", directory / f"{run.name}.stats"
    command = [*LAUNCHER, *run.flags, *run.checkpoint_flags, f"--moe-a2a-stats-json={stats_path}"]
    start = time.monotonic()
    problem = launch(command, log_path, ROOT, ENVIRONMENT, TIMEOUT_SECONDS)
    log = log_path.read_text(errors="replace")
    losses = parse_losses(log, run.last_iteration)
    if not problem and losses.keys() != {"validation", "test"}:
        problem = f"its log has no losses of iteration {run.last_iteration}"
    if problem:
        # torchrun's report at the end is long and does not say why a rank failed.
        ranks_log = re.split(r"(?m)^[EW]\d{4} .*torch/distributed/elastic", log)[0]
        raise RunError("\n    ".join([f"{problem}:", *ranks_log.splitlines()[-SHOWN_LOG_LINES:]]))
    results = {
        "setting": run.setting,
        "seed": run.seed,
        "flags": run.flags,
        "validation_loss": losses["validation"][0],
        "validation_perplexity": losses["validation"][1],
        "test_loss": losses["test"][0],
        "iterations": run.iterations,
        "seconds": time.monotonic() - start,
        "curve": parse_curve(log),
        "stats": json.loads(stats_path.read_text()),
    }
    # A file of results is never half written.
    stats_path.write_text(json.dumps(results, indent=2) + "\n")
    stats_path.replace(directory / f"{run.name}.json")
    return results


def read_results(run: Run, directory: Path) -> dict[str, Any] | None:
    """Returns the results of a finished run; exits if they are of a run with other flags."""
    path = directory / f"{run.name}.json"
    if not path.exists():
        return None
    results = json.loads(path.read_text())
    if results["flags"] != run.flags:
        sys.exit(
            f"{path}: results of a run with {' '.join(results['flags'])}, not with "
            f"{' '.join(run.flags)}. Choose another --results, or delete the file."
        )
    return results


def yardstick(results: Results) -> str:
    """Returns how far apart the seeds of uncompressed training end, as a sentence."""
    perplexities = [
        r["validation_perplexity"] for (name, _), r in results.items() if name == "none"
    ]
    if len(perplexities) < 2:
        return "Of uncompressed training there are not two seeds: no spread to judge by."
    middle = mean(perplexities)
    spread, deviation = max(perplexities) - min(perplexities), stdev(perplexities)
    return (
        f"Yardstick: {len(perplexities)} seeds of uncompressed training end {spread / middle:.2%} "
        f"apart (standard deviation {deviation / middle:.2%}); settings are compared by seed."
    )


if __name__ == "__main__":
    main()
