"""Measures how fast each codec encodes and decodes, beside memcpy of the same rows.

    python benchmarks/bench_codec.py                                # a table of every codec
    python benchmarks/bench_codec.py --codecs rq --bits 4 --threads 1,2 --json rows.json
    python benchmarks/bench_codec.py --codecs rq --impl compiled,reference
    python benchmarks/bench_codec.py --codecs rq,dithered,gaussian --device cuda

Throughput is in GB/s of the rows as float32, whatever their dtype, so that the codecs of a table
are comparable. memcpy, encoding and decoding take turns in one run and the best time of each
counts; the buffers exist beforehand. memcpy is the C library's, on as many threads: torch's copy_
is slower, as it does not bypass the cache. On CUDA it is copy_, and a time ends when the device has
finished. The sizes should exceed the last cache.
"""

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from option_lists import names, numbers
from rich.console import Console
from rich.table import Table

from megatron_moe_comp import ops
from megatron_moe_comp.compression.codec import Codec
from megatron_moe_comp.compression.codecs import CODECS
from megatron_moe_comp.compression.packet import Packet, Peer
from megatron_moe_comp.compression.random_stream import RandomStream
from megatron_moe_comp.options.codec_options import BITS_RANGE

IMPLEMENTATIONS = ("compiled", "reference")
REFERENCES = dict.fromkeys(("gaussian_pack", "cast_pack"), "_pack_reference")
REFERENCES |= dict.fromkeys(("gaussian_unpack", "unpack_cast"), "_unpack_reference")
RANDOM = RandomStream(key=1, offset=2, stream=3)
MIN_REPEATS, MIN_SECONDS = 5, 1.0


@dataclass(frozen=True)
class Result:
    """One line of the table; GB/s of float32 bytes."""

    codec: str
    bits: int | None
    dtype: str
    bytes: int
    """Of the rows as float32."""
    threads: int
    impl: str
    encode_gbs: float
    decode_gbs: float
    memcpy_gbs: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the command line asks for, prints a table and writes the JSON file."""
    options = parse_options(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device=cuda: no GPU is visible. Use --device=cpu.")
    kernels = {op for name in options.codecs for op in CODECS[name].kernels}
    missing = sorted(op for op in kernels if not ops.is_compiled(options.device, op))
    if missing and "compiled" in options.impl:
        sys.exit(
            f"--impl=compiled: the {options.device} kernels {', '.join(missing)} are not built, so "
            "their references would be measured. Build them with scripts/setup.sh, or use "
            "--impl=reference."
        )
    results = []
    for size in options.sizes:
        for dtype in options.dtypes:
            rows = make_rows(size, options.hidden, getattr(torch, dtype)).to(options.device)
            for threads in options.threads:
                torch.set_num_threads(threads)
                for name, bits, impl in cases(options):
                    with implementation(impl):
                        results.append(measure(name, bits, rows, threads, impl))
    print_table(results)
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options, lists already split; exits with a message on a bad one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    every_codec = [name for name in CODECS if name != "identity"]
    parser.add_argument("--codecs", type=names(CODECS), default=every_codec)
    parser.add_argument("--bits", type=numbers, default=[4], help="of codecs of variable width")
    parser.add_argument(
        "--dtypes", type=names(["float32", "bfloat16", "float16"]), default=["float32"]
    )
    parser.add_argument(
        "--sizes", type=numbers, default=[256], metavar="MIB", help="of the rows as float32"
    )
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--threads", type=numbers, default=[1])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--impl", type=names(IMPLEMENTATIONS), default=["compiled"])
    parser.add_argument("--json", help="file to write the rows to")
    return parser.parse_args(arguments)


def cases(options: argparse.Namespace) -> Iterator[tuple[str, int | None, str]]:
    """Yields codec, bits and implementation; "torch" for a codec that has no kernels."""
    for name in options.codecs:
        low, high = BITS_RANGE.get(name, (0, 0))
        for bits in [b for b in options.bits if low <= b <= high] if high else [None]:
            for impl in options.impl if CODECS[name].kernels else ["torch"]:
                yield name, bits, impl


@contextmanager
def implementation(impl: str) -> Iterator[None]:
    """Makes codecs call the references of their ops within the context, if `impl` says so."""
    if impl != "reference":
        yield
        return
    with ExitStack() as stack:
        for name in sorted({name for codec in CODECS.values() for name in codec.kernels}):
            module = sys.modules[getattr(ops, name).__module__]
            reference = getattr(module, REFERENCES.get(name, "_reference"))

            def op(*args: Any, reference: Any = reference, **random: int) -> None:  # noqa: ANN401
                reference(*args, *random.values())

            stack.enter_context(mock.patch.object(ops, name, op))
        yield


def make_rows(mebibytes: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns normal rows [N, hidden] that are `mebibytes` large as float32."""
    num_rows = max(2, (mebibytes << 20) // (4 * hidden))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_rows, hidden, generator=generator).to(dtype)


def measure(name: str, bits: int | None, rows: torch.Tensor, threads: int, impl: str) -> Result:
    """Returns the throughput of one codec on these rows, all of which go to one other rank."""
    codec: Codec = CODECS[name]()
    packet = Packet.plan([Peer(0, bits or 0, codec), Peer(len(rows), bits or 0, codec)], 0, rows)
    message, decoded, copy = packet.encode(rows, (), RANDOM), rows.clone(), rows.clone()
    ((_, segments),) = packet.segments
    times = best_times(
        {
            "memcpy": lambda: memcpy(copy, rows, threads),
            "encode": lambda: codec.encode(rows, segments, message, RANDOM),
            "decode": lambda: codec.decode(message, segments, decoded, RANDOM),
        },
        torch.cuda.synchronize if rows.is_cuda else lambda: None,
    )
    gigabytes = 4 * rows.numel() / 1e9
    return Result(
        codec=name,
        bits=bits,
        dtype=str(rows.dtype).removeprefix("torch."),
        bytes=4 * rows.numel(),
        threads=threads,
        impl=impl,
        **{f"{what}_gbs": gigabytes / seconds for what, seconds in times.items()},
    )


def memcpy(target: torch.Tensor, source: torch.Tensor, threads: int) -> None:
    """Copies the bytes of `source`, on a CPU with the C library, divided among threads."""
    if source.is_cuda:
        target.copy_(source)
        return
    size = source.numel() * source.itemsize
    bounds = [size * i // threads for i in range(threads + 1)]

    def copy_part(start: int, end: int) -> None:
        ctypes.memmove(target.data_ptr() + start, source.data_ptr() + start, end - start)

    if threads == 1:
        copy_part(0, size)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(copy_part, bounds, bounds[1:]))


def best_times(
    actions: dict[str, Callable[[], object]], wait: Callable[[], object]
) -> dict[str, float]:
    """Returns the best seconds of each action, which take turns; `wait` is for the device."""
    best = dict.fromkeys(actions, float("inf"))
    start, repeats = time.perf_counter(), 0
    while repeats < MIN_REPEATS or time.perf_counter() - start < MIN_SECONDS:
        for name, action in actions.items():
            wait()
            before = time.perf_counter()
            action()
            wait()
            best[name] = min(best[name], time.perf_counter() - before)
        repeats += 1
    return best


def print_table(results: Sequence[Result]) -> None:
    """Prints the results, with both throughputs as a share of memcpy's."""
    table = Table(title="GB/s of float32 bytes; in brackets the share of memcpy")
    for column in ("codec", "bits", "dtype", "MiB", "threads", "kernels"):
        table.add_column(column)
    for column in ("encode", "decode", "memcpy"):
        table.add_column(column, justify="right")
    for r in results:
        table.add_row(
            r.codec,
            "" if r.bits is None else str(r.bits),
            r.dtype,
            str(r.bytes >> 20),
            str(r.threads),
            r.impl,
            f"{r.encode_gbs:.2f} ({r.encode_gbs / r.memcpy_gbs:.2f})",
            f"{r.decode_gbs:.2f} ({r.decode_gbs / r.memcpy_gbs:.2f})",
            f"{r.memcpy_gbs:.2f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
