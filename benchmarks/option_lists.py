"""Comma-separated lists on the command lines of benchmarks."""

import argparse
from collections.abc import Callable, Iterable


def names(choices: Iterable[str]) -> Callable[[str], list[str]]:
    """Returns a parser of lists of some choices; it refuses what is not one."""
    known = list(choices)

    def split(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"{name}: not one of {', '.join(known)}. Choose one of these."
                )
        return text.split(",")

    return split


def numbers(text: str) -> list[int]:
    """Returns a list of numbers."""
    return [int(number) for number in text.split(",")]
