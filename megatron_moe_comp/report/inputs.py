"""Results: what result files hold, sorted by what they tell; read_results reads and checks them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Entry = Mapping[str, Any]

REQUIRED: dict[str, dict[str, tuple[type, ...]]] = {
    "network": {
        "rate": (str,),
        "ranks": (int,),
        "method": (str,),
        "routing": (str,),
        "step_ms": (int, float),
    },
    "quality": {
        "setting": (str,),
        "seed": (int,),
        "iterations": (int,),
        "validation_perplexity": (int, float),
        "stats": (dict,),
    },
    "statistics": {"method": (str,), "wires": (dict,), "layers": (list,)},
}
"""By kind: the keys that tell it from the others and that everything here relies on."""

IDENTITY = {"network": ("ranks", "routing", "rate", "method"), "quality": ("setting", "seed")}
"""What no two entries of a kind have in common."""

EXPECTED = (
    "JSON of benchmarks/network.py --json, of a run of benchmarks/quality.py, or of "
    "--moe-a2a-stats-json"
)


class InputError(Exception):
    """A file that cannot be used; the message names it, what was expected, and the remedy."""


@dataclass(frozen=True)
class Source:
    """A file, and what it says about how it came about."""

    path: str
    kind: str
    entries: int
    dates: tuple[str, ...]
    versions: tuple[str, ...]
    """And model and machine, where the file tells of them."""
    commands: tuple[str, ...]


@dataclass(frozen=True)
class Results:
    """Everything that was read."""

    network: list[Entry] = field(default_factory=list)
    """Rows of benchmarks/network.py: one for each rate, ranks, routing and method."""
    quality: list[Entry] = field(default_factory=list)
    """Runs of benchmarks/quality.py: one for each setting and seed."""
    statistics: list[tuple[str, Entry]] = field(default_factory=list)
    """Files of --moe-a2a-stats-json, each with the name of its file."""
    sources: list[Source] = field(default_factory=list)


def read_results(paths: Iterable[Path]) -> Results:
    """Returns what the files hold, and the JSON files in the directories at any depth.

    Raises:
        InputError: a file is missing, unreadable, foreign, or repeats what another one says.
    """
    results = Results()
    origin: dict[tuple[Any, ...], Path] = {}
    for path in find_files(paths):
        entries = read_entries(path)
        kinds = [kind_of(path, entry) for entry in entries]
        for kind, entry in zip(kinds, entries, strict=True):
            if kind == "statistics":
                results.statistics.append((path.stem, entry))
                continue
            identity = (kind, *(entry[key] for key in IDENTITY[kind]))
            if identity in origin:
                raise InputError(
                    f"{path}: {', '.join(map(str, identity))} is also in {origin[identity]}; one "
                    "result of each was expected. Make a report of each of the two files."
                )
            origin[identity] = path
            (results.network if kind == "network" else results.quality).append(entry)
        results.sources.append(describe(path, kinds[0], entries))
    return results


def find_files(paths: Iterable[Path]) -> list[Path]:
    """Returns the files, each once; directories give the *.json in them."""
    files: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file or directory. Give result files: {EXPECTED}.")
        found = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        if not found:
            raise InputError(f"{path}: holds no .json file. Expected was {EXPECTED}.")
        files |= dict.fromkeys(found)
    return list(files)


def read_entries(path: Path) -> Sequence[Entry]:
    """Returns the JSON objects of a file that is one of them, or a list."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read as JSON ({error}). Expected was {EXPECTED}; make it again."
        ) from error
    entries = content if isinstance(content, list) else [content]
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{path}: holds no results. Expected was {EXPECTED}; leave this file out.")
    return entries


def kind_of(path: Path, entry: Entry) -> str:
    """Returns which of the three kinds an object is."""
    missing = {kind: keys.keys() - entry.keys() for kind, keys in REQUIRED.items()}
    nearest = min(missing, key=lambda kind: len(missing[kind]) / len(REQUIRED[kind]))
    if missing[nearest]:
        raise InputError(
            f"{path}: not a result file: nearest to {nearest} results, but without "
            f"{', '.join(sorted(missing[nearest]))}. Expected was {EXPECTED}; leave this file out "
            "or make it again."
        )
    for key, types in REQUIRED[nearest].items():
        if not isinstance(entry[key], types):
            raise InputError(
                f"{path}: {key} is {entry[key]!r:.60}, expected was {types[0].__name__}. Make "
                "the file again."
            )
    return nearest


def describe(path: Path, kind: str, entries: Sequence[Entry]) -> Source:
    """Returns what a file says of how it came about."""

    def distinct(key: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(plain(entry[key]) for entry in entries if entry.get(key)))

    commands = distinct("command") or distinct("flags")
    versions = tuple(text for key in ("versions", "model", "cpu") for text in distinct(key))
    return Source(str(path), kind, len(entries), distinct("date"), versions, commands)


def plain(value: object) -> str:
    """Returns a value as a reader writes it: "name version, ..." of a mapping, words of a list."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
