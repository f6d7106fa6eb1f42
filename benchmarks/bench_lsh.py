"""Measures what LSH clustering adds to a layer against the expert compute that it saves.

    python benchmarks/bench_lsh.py                                  # every hash family, on one core
    python benchmarks/bench_lsh.py --tokens 8192 --dtypes bfloat16 --json rows.json
    python benchmarks/bench_lsh.py --impl compiled,reference --families fast-cross-polytope
    python benchmarks/bench_lsh.py --device cuda

Added is what a rank's dispatcher does for one layer and micro-batch, forward and backward: hashing,
clustering, centroids, and restoring rows times their probabilities. Saved is the experts' forward
and backward on all rows less that on the centroids. Everything runs once per round, experts before
each clustering, and a ratio is of times of one round. On the CPU, times are of one thread's
processor time, which other processes take no part of; on CUDA, wall-clock time with a
synchronization after each stage. Communication is not measured.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from lsh_layer import (
    FFN_FACTORS,
    Batch,
    Case,
    at_rate,
    make_batch,
    make_experts,
    run_case,
    run_experts,
)
from option_lists import names, numbers

from megatron_moe_comp import ops
from megatron_moe_comp.compression.hash_families import HASHES
from megatron_moe_comp.mcore.clustering_state import max_coordinates
from megatron_moe_comp.options.config import CompressionConfig

OPS = ("hadamard_hash", "dense_hash", "cluster_sum", "cluster_broadcast")
IMPLEMENTATIONS = ("compiled", "reference")
PLAIN = {"moe_lsh_refine": 0, "moe_lsh_residual": "none"}
VARIANTS = {
    "plain": PLAIN,
    "refine": PLAIN | {"moe_lsh_refine": 1},
    "center": PLAIN | {"moe_lsh_center": True},
    "identity": PLAIN | {"moe_lsh_residual": "identity"},
    "refine-identity": {"moe_lsh_refine": 1, "moe_lsh_residual": "identity"},
}
"""Options beside the hash family."""


class Spread(NamedTuple):
    """Of one figure over the rounds."""

    median: float
    min: float
    max: float


@dataclass(frozen=True)
class Result:
    """One line of the table; times are in microseconds per row of N."""

    device: str
    dtype: str
    tokens: int
    family: str
    variant: str
    impl: str
    coordinates: int
    rate: float
    """C / N."""
    stages: dict[str, float]
    """Medians."""
    added: Spread
    saved: dict[str, Spread]
    """By kind of expert."""
    ratio: dict[str, Spread]
    """Added over saved."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the command line asks for, prints a table and writes the JSON file."""
    options = parse_options(arguments)
    missing = [name for name in OPS if not ops.is_compiled(options.device, name)]
    if missing and "compiled" in options.impl:
        sys.exit(
            f"--impl=compiled: {', '.join(missing)}: no kernel for {options.device} is built, so "
            "the reference would be measured instead. Build them with scripts/setup.sh, or use "
            "--impl=reference."
        )
    torch.set_num_threads(1)
    results = [
        result
        for dtype in options.dtypes
        for num_tokens in options.tokens
        for result in measure(num_tokens, getattr(torch, dtype), options)
    ]
    print_table(results, options.experts)
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options, lists already split; exits with a message on a bad one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add_names(flag: str, choices: Sequence[str], default: Sequence[str]) -> None:
        parser.add_argument(flag, type=names(choices), default=list(default))

    add_names("--families", HASHES, HASHES)
    add_names("--variants", VARIANTS, VARIANTS)
    add_names("--dtypes", ("float32", "bfloat16"), ("float32", "bfloat16"))
    add_names("--impl", IMPLEMENTATIONS, ["compiled"])
    add_names("--experts", FFN_FACTORS, ["gelu"])
    parser.add_argument("--tokens", type=numbers, default=[2048, 8192])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rate", type=float, default=0.2, help="centroids per row to aim at")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", help="file to write the rows to")
    return parser.parse_args(arguments)


def measure(num_tokens: int, dtype: torch.dtype, options: argparse.Namespace) -> Iterator[Result]:
    """Yields the results of every case on one batch, timed alternately."""
    batch = make_batch(num_tokens, options.hidden, dtype, options.device)
    num_rows = batch.groups.total
    cases = list(make_cases(batch, options))
    experts = {kind: make_experts(kind, batch.rows) for kind in options.experts}
    ones = torch.ones_like(batch.probs).detach()

    def seconds_of_experts(probs: torch.Tensor, sizes: torch.Tensor) -> dict[str, float]:
        return {
            kind: run_experts(kind, of_kind, batch.rows, probs, sizes.tolist())
            for kind, of_kind in experts.items()
        }

    rounds = []
    for _ in range(options.rounds + 1):
        on_rows = seconds_of_experts(batch.probs, batch.groups.num_rows)
        of_cases = []
        for case in cases:
            # Before clustering, as other work is in training: it takes cache and memory.
            on_centroids = seconds_of_experts(ones, case.clusters.num_per_expert)
            saved = {kind: on_rows[kind] - on_centroids[kind] for kind in experts}
            of_cases.append((run_case(case, batch), saved))
        rounds.append(of_cases)
    del rounds[0]  # warms up
    scale = 1e6 / num_rows
    for case, of_rounds in zip(cases, zip(*rounds, strict=True), strict=True):
        laps = [lap for lap, _ in of_rounds]
        added = [scale * sum(lap.values()) for lap in laps]
        saved = {kind: [scale * saved[kind] for _, saved in of_rounds] for kind in experts}
        yield Result(
            device=options.device,
            dtype=str(dtype).removeprefix("torch."),
            tokens=num_tokens,
            family=case.family,
            variant=case.variant,
            impl=case.impl,
            coordinates=case.num_coordinates,
            rate=len(case.clusters) / num_rows,
            stages={stage: scale * median(lap[stage] for lap in laps) for stage in laps[0]},
            added=spread(added),
            saved={kind: spread(values) for kind, values in saved.items()},
            ratio={
                kind: spread([a / s for a, s in zip(added, values, strict=True)])
                for kind, values in saved.items()
            },
        )


def spread(values: Sequence[float]) -> Spread:
    """Returns the median and the extremes."""
    return Spread(median(values), min(values), max(values))


def make_cases(batch: Batch, options: argparse.Namespace) -> Iterator[Case]:
    """Yields every case, at the rate aimed at."""
    for family in options.families:
        for variant in options.variants:
            config = CompressionConfig(
                moe_a2a_compress="lsh",
                moe_lsh_hash=family,
                moe_lsh_target_rate=options.rate,
                **VARIANTS[variant],
            )
            hash_ = HASHES[family](
                batch.rows.shape[1],
                max_coordinates(config),
                config.moe_lsh_hash_dim,
                seed=0,
                layer=1,
            )
            number, clusters = at_rate(config, hash_, batch)
            for impl in options.impl:
                yield Case(family, variant, impl, config, hash_, number, clusters)


def print_table(results: Sequence[Result], kinds: Sequence[str]) -> None:
    """Prints the results as Markdown."""
    stages = list(results[0].stages)
    columns = ["dtype", "tokens", "hash", "variant", "kernels", "L", "rate", *stages, "added"]
    columns += [f"{what}, {kind}" for kind in kinds for what in ("saved", "added / saved")]
    print("Microseconds per row; ratios: median (min to max)")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for r in results:
        cells = [r.dtype, str(r.tokens), r.family, r.variant, r.impl, str(r.coordinates)]
        cells += [f"{r.rate:.3f}", *(f"{r.stages[stage]:.2f}" for stage in stages)]
        cells.append(f"{r.added.median:.2f}")
        for kind in kinds:
            ratio = r.ratio[kind]
            cells.append(f"{r.saved[kind].median:.1f}")
            cells.append(f"{ratio.median:.3f} ({ratio.min:.3f} to {ratio.max:.3f})")
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
