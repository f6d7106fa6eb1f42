"""Shows what the bit policies do to the most loaded rank and to the error, and their time.

    python benchmarks/bench_bits.py [--ranks 8,64,256] [--bits 4,6] [--json PATH]

Loads: balanced with 5% noise, one rank that receives four times the mean, and Zipf's law. Cut: by
how much the bytes of the most loaded rank fall below those of uniform bits. Variance: of a value,
over the square of its scale, mean over rows.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megatron_moe_comp.compression.bit_allocation import (
    POLICIES,
    allocate_bits,
    most_loaded,
    variance,
)

REPEATS = 30
MAX_BITS = 8


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints one line per load, number of ranks, target, least bits and policy."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", default="8,64,256", help="at least 5")
    parser.add_argument("--bits", default="4,6")
    parser.add_argument("--json", help="file to write the rows to")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = []
    for ranks in map(int, options.ranks.split(",")):
        if ranks < 5:
            parser.error(f"--ranks={ranks}: no rank of so few receives four times the mean. Use 5.")
        for load, num_rows in loads(ranks).items():
            for bits in map(int, options.bits.split(",")):
                for min_bits in sorted({2, max(2, bits // 2)}):
                    results += [measure(num_rows, load, p, bits, min_bits) for p in POLICIES]
    kernel = torch._C._dispatch_has_kernel_for_dispatch_key(
        "megatron_moe_comp::allocate_bits", "CPU"
    )
    table = Table(title=f"Bit policies; kernel: {'C++' if kernel else 'reference'}, one thread")
    for column in results[0]:
        table.add_column(column, justify="left" if column in ("load", "policy") else "right")
    for row in results:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=110).print(table)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n")


def loads(ranks: int, rows_per_rank: int = 16384) -> dict[str, torch.Tensor]:
    """Returns rows from each rank to each other, int64 [ranks, ranks], of several routings."""
    generator = torch.Generator().manual_seed(ranks)
    balanced = 0.95 + 0.1 * torch.rand(ranks, ranks, generator=generator)
    hot = torch.full((ranks, ranks), (ranks - 4) / (ranks - 1))
    hot[:, 1] = 4.0
    zipf = (1 / torch.arange(1, ranks + 1).float() ** 0.8).expand(ranks, ranks)
    return {
        name: (shares / shares.sum(dim=1, keepdim=True) * rows_per_rank).round().long()
        for name, shares in (("balanced", balanced), ("one rank 4x", hot), ("Zipf 0.8", zipf))
    }


def measure(
    num_rows: torch.Tensor, load: str, policy: str, target_bits: int, min_bits: int
) -> dict[str, str | int | float]:
    """Returns one line of the table."""
    limits = {"target_bits": target_bits, "min_bits": min_bits, "max_bits": MAX_BITS}
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        bits = allocate_bits(num_rows, policy, **limits)
        best = min(best, time.perf_counter() - start)
    crossing = num_rows - num_rows.diagonal().diag()
    total = int(crossing.sum())
    uniform = most_loaded(crossing * target_bits)
    return {
        "ranks": len(num_rows),
        "load": load,
        "bits": target_bits,
        "min": min_bits,
        "policy": policy,
        "cut (%)": round(100 * (1 - most_loaded(crossing * bits) / uniform), 1),
        "mean bits": round(int((crossing * bits).sum()) / total, 3),
        "variance": variance(num_rows, bits) / total,
        "time (ms)": round(1e3 * best, 3),
    }


if __name__ == "__main__":
    main()
