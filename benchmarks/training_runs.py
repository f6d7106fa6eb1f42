"""Runs whole trainings as processes of their own and reads what they print."""

import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

GRACE_SECONDS = 40.0


def launch(
    command: Sequence[str],
    log_path: Path,
    directory: Path,
    environment: Mapping[str, str],
    timeout_seconds: float,
) -> str | None:
    """Runs a command with its output in a file; returns what went wrong.

    Args:
        command: what to run.
        log_path: its output, overwritten.
        directory: where it runs.
        environment: variables beside those of this process.
        timeout_seconds: after which it is ended.
    """
    with log_path.open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=os.environ | dict(environment),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return f"ended after {timeout_seconds:.0f} s"
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


def parse_curve(log: str) -> list[tuple[int, float]]:
    """Returns the training loss of every line of the log: its last iteration, and the mean loss."""
    pattern = r"(?m)^.* iteration +(\d+)/ *\d+ \|.*? lm loss: (\S+) \|"
    return [(int(iteration), float(loss)) for iteration, loss in re.findall(pattern, log)]
