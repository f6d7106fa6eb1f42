"""Shows how a training goes, from its --moe-a2a-stats-jsonl file, on any machine that sees it.

python -m megatron_moe_comp.watch runs/gpt-moe-17/a2a.jsonl
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Record = Mapping[str, Any]

REFRESH_S = 2.0
LOSSES = 60
BARS = " ▁▂▃▄▅▆▇█"
OVERDUE = 3
"""Usual times between two lines after which a run is said to be silent."""


def main(argv: Sequence[str] | None = None) -> None:
    """Draws the latest state of a training until it has ended, or is interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_moe_comp.watch",
        description="Shows how a training goes: progress, loss, traffic and times.",
    )
    parser.add_argument(
        "path",
        type=Path,
        help="file that the training was given as --moe-a2a-stats-jsonl, or a directory with an "
        "a2a.jsonl: RESULTS of a job",
    )
    parser.add_argument("--once", action="store_true", help="draw once and end")
    options = parser.parse_args(argv)
    try:
        path = options.path / "a2a.jsonl" if options.path.is_dir() else options.path
        if options.once:
            Console().print(view(read_records(path), datetime.now(UTC)))
        else:
            follow(path)
    except ValueError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        pass


def follow(path: Path) -> None:
    """Draws the file's state again and again until the training has ended in order."""
    records = read_records(path)
    with Live(console=Console(), auto_refresh=False) as live:
        while True:
            live.update(view(records, datetime.now(UTC)), refresh=True)
            if records and records[-1].get("ended"):
                return
            time.sleep(REFRESH_S)
            records = read_records(path)


def read_records(path: Path) -> list[Record]:
    """Returns the records of a training so far: of what was done twice, after a stop, the last.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    try:
        lines = path.read_text().split("\n")
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}). Name the file that the training was given "
            "as --moe-a2a-stats-jsonl."
        ) from error
    records: list[Record] = []
    for line in lines[:-1]:  # the last may still be written
        try:
            record = json.loads(line)
            iteration = record["iteration"]
        except (ValueError, KeyError, TypeError):
            continue  # what a killed process wrote of a line
        while records and records[-1]["iteration"] >= iteration:
            records.pop()
        records.append(record)
    if len(lines) > 1 and not records:
        raise ValueError(
            f"{path}: holds no record of a training. Name a file that was written by "
            "--moe-a2a-stats-jsonl."
        )
    return records


def view(records: Sequence[Record], now: datetime) -> RenderableType:
    """Returns what is shown of a training at a time.

    Args:
        records: see `training.stats_logger.StatsLogger`; the latest is drawn, with earlier losses.
        now: with a time zone.
    """
    if not records:
        return Text("No log interval has passed yet.")
    latest = records[-1]
    parts: list[RenderableType] = [_progress(records, now), Text()]
    losses = [record["loss"] for record in records if record["loss"] is not None]
    if losses:
        parts.append(Text(f"loss {losses[-1]:.4f}  {_sparkline(losses[-LOSSES:])}"))
    if latest["ratio_fp32"] is None:
        return Group(*parts, Text("Nothing crossed a wire."))
    parts += [Text(), _wires(latest)]
    if latest["phase_seconds"]:
        parts += [Text(), _phases(latest["phase_seconds"], latest["seconds_per_iteration"])]
    parts.append(Text())
    parts += [Text(line) for line in _details(latest)]
    return Group(*parts)


def _progress(records: Sequence[Record], now: datetime) -> RenderableType:
    latest = records[-1]
    done, total = latest["iteration"], latest["train_iters"]
    words = f"{latest['setting']}, {latest['ranks']} ranks   iteration {done} of {total}"
    seconds = latest["seconds_per_iteration"]
    if seconds:
        left = timedelta(seconds=round(seconds * (total - done)))
        words += f"   {_duration(seconds)} each   {left} left"
        interval = done - records[-2]["iteration"] if len(records) > 1 else 0
        silent = now - datetime.fromisoformat(latest["time"])
        if latest.get("ended"):
            words += "\nEnded."
        elif interval and silent.total_seconds() > OVERDUE * interval * seconds:
            words += f"\nNo line for {timedelta(seconds=round(silent.total_seconds()))}."
    return Group(Text(words), ProgressBar(total=total, completed=done, width=80))


def _wires(record: Record) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("wire")
    for column in ("MB per iteration", "as float32", "ratio", "SQNR (dB)"):
        table.add_column(column, justify="right")
    whole = {key: record[key] for key in ("raw_bytes", "wire_bytes")} | {"sqnr_db": None}
    for name, wire in (record["wires"] | {"all": whole}).items():
        raw, sent, sqnr = wire["raw_bytes"], wire["wire_bytes"], wire["sqnr_db"]
        table.add_row(
            name,
            f"{sent / 1e6:.3f}",
            f"{raw / 1e6:.3f}",
            f"{raw / sent:.2f}x" if sent else "",
            f"{sqnr:.1f}" if sqnr is not None else "",
        )
    return table


def _phases(phase_seconds: Mapping[str, float], seconds: float | None) -> Table:
    """Returns the times of phases, each with its share of an iteration."""
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("phase")
    table.add_column("ms", justify="right")
    table.add_column("share of an iteration" if seconds else "")
    for phase, taken in phase_seconds.items():
        share = min(1.0, taken / seconds) if seconds else 0.0
        bar = ProgressBar(total=1.0, completed=share, width=40) if seconds else ""
        table.add_row(phase, f"{1e3 * taken:.1f}", bar)
    return table


def _details(record: Record) -> list[str]:
    """Returns what only some methods have, a line each."""
    lines = []
    if bits := record["rows_of_bits"]:
        total = sum(bits.values())
        shares = "  ".join(f"{number}: {rows / total:.0%}" for number, rows in bits.items())
        lines.append(f"rows by bits per value  {shares}   mean {record['mean_bits']:.2f}")
    for what in ("rank", "node"):
        if load := record[f"most_loaded_{what}"]:
            raw, uniform, sent = (value / 1e3 for value in load.values())
            lines.append(
                f"most loaded {what}  {sent:.1f} kB per layer and micro-batch, {uniform:.1f} with "
                f"the same bits for all, {raw:.1f} as float32"
            )
    if (lsh := record["lsh"]) and lsh["rows"]:
        lines.append(f"clustering  {lsh['rate']:.3f} centroids per row")
    return lines


def _sparkline(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    scale = (len(BARS) - 2) / (high - low) if high > low else 0.0
    return "".join(BARS[1 + round((value - low) * scale)] for value in values)


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"


if __name__ == "__main__":
    main()
