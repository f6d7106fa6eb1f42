"""Where figures go besides the console: files that rank 0 writes, TensorBoard and W&B."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from megatron.training import get_tensorboard_writer, get_wandb_writer


def require_writable(option: str, path: str) -> None:
    """Creates the file and its directory where they are missing, on rank 0.

    Raises:
        ValueError: rank 0 cannot write the file that `option` names.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("a+b") as file:
            if file.tell():  # a line that a killed process did not end would spoil the next
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    file.write(b"\n")
    except OSError as error:
        raise ValueError(
            f"{option}={path}: rank 0 must be able to write this file, but {error.strerror}. Name "
            "a file in a directory that you may write to."
        ) from error


def write_file(option: str, path: str, text: str, mode: Literal["a", "w"]) -> None:
    """Adds to, or replaces, the text of a file; says so where it cannot, for training to go on."""
    try:
        with Path(path).open(mode) as file:
            file.write(text)
    except OSError as error:
        print(f"{option}={path}: not written, {error.strerror}. Training goes on.", flush=True)


def write_scalars(scalars: dict[str, float], iteration: int) -> None:
    """Writes the values to TensorBoard and W&B, on the rank that has their writers."""
    writer, wandb_writer = get_tensorboard_writer(), get_wandb_writer()
    if writer:
        for name, value in scalars.items():
            writer.add_scalar(name, value, iteration)
    if wandb_writer:
        wandb_writer.log(scalars, iteration)


def write_histogram(name: str, counts: Mapping[int, int], iteration: int) -> None:
    """Writes how often each whole number occurred, like `write_scalars`."""
    writer, wandb_writer = get_tensorboard_writer(), get_wandb_writer()
    if not counts or not (writer or wandb_writer):
        return
    numbers = range(min(counts), max(counts) + 1)
    occurred = [counts.get(number, 0) for number in numbers]
    if writer:
        writer.add_histogram_raw(
            name,
            min=numbers[0],
            max=numbers[-1],
            num=sum(occurred),
            sum=sum(number * n for number, n in counts.items()),
            sum_squares=sum(number**2 * n for number, n in counts.items()),
            bucket_limits=[number + 0.5 for number in numbers],
            bucket_counts=occurred,
            global_step=iteration,
        )
    if wandb_writer:
        edges = [number - 0.5 for number in (*numbers, numbers[-1] + 1)]
        histogram = wandb_writer.Histogram(np_histogram=(occurred, edges))
        wandb_writer.log({name: histogram}, iteration)


def write_panels(category: str, panels: Mapping[str, Sequence[str]]) -> None:
    """Makes TensorBoard draw together what belongs together, on its page of custom scalars.

    Args:
        category: what to call all of them.
        panels: by title, regular expressions of the names drawn in one chart.
    """
    if writer := get_tensorboard_writer():
        layout = {title: ["Multiline", list(names)] for title, names in panels.items()}
        writer.add_custom_scalars({category: layout})
