"""Measures what LSH clustering costs in quality: trains the default model for settings x seeds.

    python benchmarks/lsh_quality.py --results runs/lsh                      # all, from scratch
    python benchmarks/lsh_quality.py --results runs/lsh --settings none,lsh-none --seeds 1,2
    python benchmarks/lsh_quality.py --results runs/lsh-1000 --from-checkpoint 1000

Each run is scripts/run_local.sh on the CPU with 2 ranks and the flags of its setting, evaluated
once, at its end. DIR/SETTING-seedS.log is its output, DIR/SETTING-seedS.json its results; a run
with results is not repeated, so the same command goes on where it was stopped.

With --from-checkpoint N, seed S first trains N iterations without compression, in which the
learning rate falls to 1e-4. Every setting goes on from there at that rate, with the optimizer's
state and the data that would have followed. Iterations go on counting from N, so a warm-up would be
over before it started: settings with one are left out.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = ("bash", str(ROOT / "scripts" / "run_local.sh"))
ENVIRONMENT = {"RANKS": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TIMEOUT_SECONDS, GRACE_SECONDS, SHOWN_LOG_LINES = 600.0, 40.0, 15

LSH = ("--moe-a2a-compress=lsh", "--moe-lsh-target-rate=0.2")
WARMUP, REFINE = "--moe-lsh-warmup-iters=200", "--moe-lsh-refine=1"
PLAIN = (*LSH, "--moe-lsh-residual=none", "--moe-lsh-refine=0")
SETTINGS = {"none": ("--moe-a2a-compress=none",)}
SETTINGS |= {
    f"lsh-{residual}{warmup and '-warmup'}{'-refine' if refine == REFINE else ''}": tuple(
        flag for flag in (*LSH, f"--moe-lsh-residual={residual}", warmup, refine) if flag
    )
    for residual in ("none", "identity", "fitted")
    for warmup in ("", WARMUP)
    for refine in ("--moe-lsh-refine=0", REFINE)
}
SETTINGS |= {
    # The control: clusters of the same sizes, of random rows.
    "lsh-none-random": (*PLAIN, "--moe-lsh-hash=random"),
    "lsh-none-warmup-random": (*PLAIN, WARMUP, "--moe-lsh-hash=random"),
    "lsh-none-center": (*PLAIN, "--moe-lsh-center"),
    "lsh-none-per-row": (*PLAIN, "--moe-lsh-gradient=per-row"),
    "lsh-none-refine-rq4": (*LSH, "--moe-a2a-codec=rq", "--moe-a2a-bits=4"),
}


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
        return [f"--seed={self.seed}", *schedule, *self.setting_flags]


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
    print(f"\nValidation perplexity after {options.iters} iterations{start}.\n")
    print(table(options.settings, options.seeds, results), flush=True)
    if failed:
        sys.exit(f"\n{len(failed)} failed: {', '.join(failed)}")


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options, lists split and `none` first; exits with a message on a bad one."""

    def seeds(text: str) -> list[int]:
        return [int(seed) for seed in text.split(",")]

    def settings(text: str) -> list[str]:
        names = list(SETTINGS) if text == "all" else text.split(",")
        if unknown := [name for name in names if name not in SETTINGS]:
            raise argparse.ArgumentTypeError(
                f"{unknown[0]}: not one of {', '.join(SETTINGS)}. Choose some of these, or all."
            )
        return sorted(names, key=lambda name: name != "none")

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seeds", type=seeds, default=[1, 2, 3])
    parser.add_argument("--iters", type=int, default=600, help="of every setting")
    parser.add_argument("--settings", type=settings, default=list(SETTINGS))
    parser.add_argument("--from-checkpoint", type=int, default=0, metavar="ITERS")
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    options = parser.parse_args(arguments)
    if options.from_checkpoint:
        options.settings = [name for name in options.settings if WARMUP not in SETTINGS[name]]
    return options


def plan(options: argparse.Namespace, directory: Path) -> list[Run]:
    """Returns the runs in their order: all settings of the first seed, then of the next."""
    start = options.from_checkpoint
    # Beyond the last iteration of its decay the learning rate stays what it is.
    decay = ("--min-lr=1e-4", f"--lr-decay-iters={start}") if start else ()
    runs: list[Run] = []
    for seed in options.seeds:
        path = directory / f"checkpoint-seed{seed}"
        save = ("--ckpt-format=torch", f"--save={path}", f"--save-interval={start}")
        # Overriding: Megatron refuses to load the schedule of a run of another length.
        load = ("--ckpt-format=torch", f"--load={path}", "--override-opt-param-scheduler")
        if start:
            runs.append(Run("checkpoint", seed, start, start, decay + SETTINGS["none"], save))
        for name in options.settings:
            flags, last = decay + SETTINGS[name], start + options.iters
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
    problem = launch(command, log_path)
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
        "stats": json.loads(stats_path.read_text()),
    }
    # A file of results is never half written.
    stats_path.write_text(json.dumps(results, indent=2) + "\n")
    stats_path.replace(directory / f"{run.name}.json")
    return results


def launch(command: Sequence[str], log_path: Path) -> str | None:
    """Runs a command with its output in a file; returns what went wrong."""
    with log_path.open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            return f"ended after {TIMEOUT_SECONDS:.0f} s"
        finally:
            if process.poll() is None:
                end(process)
    return f"exit status {status}" if status else None


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and its descendants: politely at first, as torchrun then ends its ranks."""
    # Ranks are in sessions of their own, where a signal to the group does not reach them.
    descendants = find_descendants(process.pid)
    os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    process.kill()
    for pid in descendants:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def find_descendants(ancestor: int) -> list[int]:
    """Returns the process IDs of the children of a process, their children and so on."""
    found = [ancestor]
    for pid in found:
        with suppress(FileNotFoundError):
            found += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return found[1:]


def parse_losses(log: str, iteration: int) -> dict[str, tuple[float, float]]:
    """Returns loss and perplexity of the parts "validation" and "test" after this iteration."""
    pattern = (
        rf"validation loss at iteration {iteration} on (validation|test) set \| "
        r"lm loss value: (\S+) \| lm loss PPL: (\S+) \|"
    )
    return {part: (float(loss), float(ppl)) for part, loss, ppl in re.findall(pattern, log)}


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


def table(settings: Sequence[str], seeds: Sequence[int], results: Results) -> str:
    """Returns a Markdown table; ratios to `none` are of the same seed, then averaged."""
    means = ("mean", "ratio to none (min..max)", "rate", "wire bytes ratio")
    lines = [["setting", *(f"seed {s}" for s in seeds), *means], ["---"] * (5 + len(seeds))]
    for name in [name for name in settings if any((name, s) in results for s in seeds)]:
        finished = {s: results[name, s] for s in seeds if (name, s) in results}
        perplexities = {s: r["validation_perplexity"] for s, r in finished.items()}
        baseline = {s: results["none", s] for s in perplexities if ("none", s) in results}
        ratios = [perplexities[s] / r["validation_perplexity"] for s, r in baseline.items()]
        wire_ratios = [r["stats"]["ratio_fp32"] for r in finished.values()]
        rates = [r["stats"]["lsh"]["rate"] for r in finished.values() if r["stats"].get("lsh")]
        lines.append(
            [
                name,
                *(f"{perplexities[s]:.2f}" if s in perplexities else "-" for s in seeds),
                f"{mean(perplexities.values()):.2f}",
                f"{mean(ratios):.4f} ({min(ratios):.4f}..{max(ratios):.4f})" if ratios else "-",
                f"{mean(rates):.3f}" if rates else "-",
                f"{mean(wire_ratios):.2f}x",
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    main()
