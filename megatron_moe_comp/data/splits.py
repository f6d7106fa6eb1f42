"""Which documents train, which validate and which test.

Documents are ordered by a hash of their name and the seed, and the order is cut at the shares'
counts: the same names and seed give the same split on every machine. The shares are shares of
documents; every split with a share above zero gets at least one.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from megatron_moe_comp.data.errors import PreparationError

SPLIT_NAMES = ("train", "valid", "test")

_REMEDY = "give three percentages for train, validation and test, such as 90,5,5"


def parse_split(text: str) -> tuple[float, ...]:
    """The percentages in ``text``, such as "90,5,5", checked by :func:`check_split`."""
    try:
        percentages = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise PreparationError(f"--split {text}: not a list of numbers: {_REMEDY}") from None
    check_split(percentages)
    return percentages


def check_split(percentages: Sequence[float]) -> None:
    """Raise PreparationError unless these are three shares from 0 up that sum to 100."""
    given = f"--split {format_split(percentages)}"
    if len(percentages) != len(SPLIT_NAMES):
        raise PreparationError(f"{given}: {len(percentages)} share(s), not 3: {_REMEDY}")
    if not all(percentage >= 0 for percentage in percentages):
        raise PreparationError(f"{given}: every share must be 0 or more: {_REMEDY}")
    if not math.isclose(sum(percentages), 100.0, abs_tol=1e-6):
        raise PreparationError(
            f"{given}: the shares sum to {sum(percentages):g}, not 100: {_REMEDY}"
        )


def format_split(percentages: Sequence[float]) -> str:
    """The shares as --split takes them."""
    return ",".join(f"{percentage:g}" for percentage in percentages)


def hash_name(name: str, seed: int) -> int:
    """The 64-bit number that places a document of this name in the order."""
    # File names that are not UTF-8 hold surrogates.
    key = f"{seed}\0{name}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def count_documents(num_documents: int, percentages: Sequence[float]) -> list[int]:
    """How many of ``num_documents`` each split gets; the largest share takes the remainder.

    Example: 1000 documents at 90, 5, 5 -> [900, 50, 50]; 4 documents -> [2, 1, 1].

    Raises:
        PreparationError: there are fewer documents than splits with a share.
    """
    used = sum(percentage > 0 for percentage in percentages)
    if num_documents < used:
        raise PreparationError(
            f"--split {format_split(percentages)}: {num_documents} document(s) cannot fill "
            f"{used} splits: give more documents (a text file is one, a JSONL line is one), or a "
            "share of 0 to the splits you do not need, such as --split 100,0,0"
        )
    counts = [
        max(1, math.floor(num_documents * percentage / 100)) if percentage > 0 else 0
        for percentage in percentages
    ]
    largest = max(range(len(counts)), key=lambda index: percentages[index])
    counts[largest] += num_documents - sum(counts)
    return counts


def assign_splits(hashes: Sequence[int], percentages: Sequence[float]) -> np.ndarray:
    """The index into SPLIT_NAMES of each document, uint8, in the order of ``hashes``.

    Raises:
        PreparationError: see :func:`count_documents`.
    """
    counts = count_documents(len(hashes), percentages)
    order = np.argsort(np.asarray(hashes, dtype=np.uint64), kind="stable")
    split_of_document = np.empty(len(hashes), dtype=np.uint8)
    split_of_document[order] = np.repeat(np.arange(len(counts), dtype=np.uint8), counts)
    return split_of_document
