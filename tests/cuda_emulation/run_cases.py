"""Runs the ops on a few small cases and prints a digest of what they wrote.

For libraries that Python can only load in a process of its own: those built with a sanitizer, and
those of mutated sources, which may crash or never end.
"""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.cuda_emulation import clusters, hashes
from tests.cuda_emulation.build import ROOT, SOURCES, emulated, sanitizer_environment
from tests.cuda_emulation.kernels import EmulatedDithering, EmulatedGaussian, EmulatedKernels


class Case(NamedTuple):
    """Arguments of both ops; the scales are given, or computed and sent."""

    rows: np.ndarray
    row_type: str
    row_scales: np.ndarray | None
    segments: list[int]
    message_bytes: int


def cases(few_blocks: bool) -> Iterator[Case]:
    """Yields cases that together take every path through the kernels.

    Args:
        few_blocks: leave out the case with many blocks, for which TSan takes long.
    """
    yield _case("bfloat16", 264, [(2, 9), (4, 1), (3, 4)])
    yield _case("float16", 13, [(5, 3), (7, 2), (6, 0), (8, 66)])
    yield _case("float32", 1048, [(3, 8), (4, 2)], given=True)
    yield _case("float16", 16, [(5, 4)], skip=1)
    yield _case("bfloat16", 1031, [(6, 3)])
    if not few_blocks:
        yield _case("float32", 8, [(2, 1), (8, 2)] * 49)
    yield _case("float16", 8200, [(8, 1), (3, 1)])
    yield _case("float32", 8201, [(5, 2)])
    yield _case("bfloat16", 16392, [(4, 1)])


def _case(
    row_type: str,
    hidden: int,
    segments: list[tuple[int, int]],
    given: bool = False,
    skip: int = 0,
) -> Case:
    """Returns a case whose rows begin `skip` values behind an aligned address."""
    generator = np.random.default_rng(hidden)
    num_rows = 1 + sum(rows for _, rows in segments)
    values = generator.standard_normal((num_rows, hidden), np.float32)
    if num_rows > 6:
        values[1, 3::5] = np.nan
    rows = values.view(np.uint32)
    if row_type == "bfloat16":
        rows = (rows >> 16).astype(np.uint16)
    elif row_type == "float16":
        rows = values.astype(np.float16).view(np.uint16)
    rows = np.concatenate((rows.ravel()[:skip], rows.ravel()))[skip:].reshape(rows.shape)
    table, end, first = [], 5, 1
    for num_bits, count in segments:
        scales = end + -(-hidden * num_bits // 8) * count + 3
        table += [first, count, num_bits, end, scales]
        end, first = scales + 4 * count, first + count
    scales = np.abs(values).max(1) * np.float32(1.25) if given else None
    return Case(rows, row_type, scales, table, end)


def digest(kernels: EmulatedKernels, dithering: EmulatedDithering, few_blocks: bool) -> str:
    """Returns the digest of all messages, and of the rows that come out of them."""
    digest = hashlib.sha256()
    for case in cases(few_blocks):
        # Of exactly the size that is needed, so that nothing hides what is written behind it.
        message = np.full(case.message_bytes, 0xFF, np.uint8)
        random = (0x123456789ABCDEF0, 3, 0xFFFFFFFE)
        kernels.quantize_pack(
            case.rows, case.row_type, case.row_scales, message, case.segments, random
        )
        if case.row_scales is None:
            decoded, senders, dithered = np.zeros_like(case.rows), [], np.full_like(message, 0xFF)
            kernels.quantize_pack(
                case.rows, case.row_type, None, dithered, case.segments, random, mid_rise=True
            )
            for i in range(len(case.segments) // 5):
                senders += [7 * i, random[0] + i]
            dithering.unpack_dithered(
                dithered, decoded, case.row_type, case.segments, senders, random[1:]
            )
            digest.update(dithered.tobytes() + decoded.tobytes())
        rows = case.rows  # in place: what is not written stays
        kernels.unpack_dequantize(message, case.row_scales, rows, case.row_type, case.segments)
        digest.update(message.tobytes() + rows.tobytes())
    return digest.hexdigest()


def gaussian_digest(kernels: EmulatedGaussian, few_blocks: bool) -> str:
    """Returns the digest of all messages, and of the rows that come out of them."""
    digest = hashlib.sha256()
    for case in cases(few_blocks):
        table = list(case.segments)
        table[2::5] = [2 + num_bits % 3 for num_bits in table[2::5]]
        end = 5
        for i in range(0, len(table), 5):
            table[i + 3], end = end, end + -(-case.rows.shape[1] * table[i + 2] // 8) * table[i + 1]
            table[i + 4], end = end, end + 2 * table[i + 1]
        message, rows = np.full(end, 0xFF, np.uint8), np.zeros_like(case.rows)
        kernels.gaussian_pack(case.rows, case.row_type, message, table)
        kernels.gaussian_unpack(message, rows, case.row_type, table)
        digest.update(message.tobytes() + rows.tobytes())
    return digest.hexdigest()


def run(
    sanitizer: str, few_blocks: bool | None = None, **sources: Path
) -> subprocess.CompletedProcess[str]:
    """Returns the end of a process that prints the digests of both orders of threads.

    Args:
        sanitizer: with which the libraries are built.
        few_blocks: see `cases`; None: as the sanitizer needs it.
        sources: the `kernels` folder of an op, if it is not the usual one.
    """
    libraries = [
        emulated(op, sanitizer, kernels=sources[op]) if op in sources else emulated(op, sanitizer)
        for op in SOURCES
    ]
    few_blocks = sanitizer == "thread" if few_blocks is None else few_blocks
    module = "tests.cuda_emulation.run_cases"
    return subprocess.run(
        [sys.executable, "-m", module, str(int(few_blocks)), *map(str, libraries)],
        cwd=ROOT,
        env=sanitizer_environment(sanitizer),
        capture_output=True,
        text=True,
        timeout=300,
    )


def main() -> None:
    """Prints one digest per order of threads."""
    few_blocks, paths = bool(int(sys.argv[1])), map(Path, sys.argv[2:])
    library = dict(zip(SOURCES, paths, strict=True))
    for reverse in (False, True):
        kernels = EmulatedKernels(library["quantize_pack"], library["unpack_dequantize"], reverse)
        print(
            digest(kernels, EmulatedDithering(library["unpack_dithered"], reverse), few_blocks)
            + gaussian_digest(EmulatedGaussian(library["gaussian"], reverse), few_blocks)
            + clusters.digest(clusters.EmulatedClusters(library["cluster_sum"], reverse))
            + hashes.digest(hashes.EmulatedHashes(library["lsh_hash"], reverse)),
            flush=True,
        )


if __name__ == "__main__":
    main()
