"""Pairs of an input and a target text, one JSON object a line, as token ids in memory."""

import itertools
import json
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_moe_comp.data.errors import PreparationError
from megatron_moe_comp.data.options import default_workers
from megatron_moe_comp.data.t5_tokenizer import T5Tokenizer

_BATCH_LINES = 8192
_LINES_SHOWN = 5


class TokenLists:
    """Token ids of many texts in one array, each text cut to ``max_tokens`` with its end id."""

    def __init__(self, max_tokens: int, eos_id: int) -> None:
        self.max_tokens = max_tokens
        self._eos_id = eos_id
        self._ids = array("i")
        self._starts = array("q", [0])

    def append(self, ids: list[int]) -> None:
        """Add the ids of a text, which have no end yet."""
        self._ids.extend(ids[: self.max_tokens - 1])
        self._ids.append(self._eos_id)
        self._starts.append(len(self._ids))

    def __getitem__(self, index: int) -> np.ndarray:
        """The ids at ``index``, from 0 up, int32; a view."""
        start, end = self._starts[index], self._starts[index + 1]
        return np.frombuffer(self._ids, np.int32, end - start, start * self._ids.itemsize)


@dataclass
class FoundLines:
    """How many lines of a file are of one kind, and the first of them with the reason."""

    count: int = 0
    first: list[tuple[int, str]] = field(default_factory=list)

    def add(self, number: int, reason: str) -> None:
        """Count the line of this number, from 1 up."""
        self.count += 1
        if len(self.first) < _LINES_SHOWN:
            self.first.append((number, reason))

    def reasons(self) -> str:
        """Such as "line 3: no 'target'; line 17: not JSON and 7 more"."""
        listed = "; ".join(f"line {number}: {reason}" for number, reason in self.first)
        rest = self.count - len(self.first)
        return f"{listed} and {rest} more" if rest else listed


class Pairs:
    """The usable pairs of a file, in its order; ``remarks`` says what was left out or cut."""

    def __init__(
        self,
        path: Path,
        file_state: tuple[int, int],
        line_starts: array,
        inputs: TokenLists,
        targets: TokenLists,
        remarks: list[str],
    ) -> None:
        self._path, self._file_state, self._line_starts = path, file_state, line_starts
        self._inputs, self._targets = inputs, targets
        self.remarks = remarks

    def __len__(self) -> int:
        return len(self._line_starts)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids of the input and of the target, int32, each with its end."""
        index = range(len(self))[index]
        return self._inputs[index], self._targets[index]

    def target_text(self, index: int) -> str:
        """The target as it is in the file, which is read for it.

        Raises:
            PreparationError: the file was changed since the pairs were read.
        """
        if _file_state(self._path) != self._file_state:
            raise PreparationError(
                f"{self._path}: was changed while in use: start again with the finished file"
            )
        with self._path.open("rb") as stream:
            stream.seek(self._line_starts[index])
            return parse_pair(stream.readline())[1]


def read_pairs(
    path: str | os.PathLike[str],
    tokenizer: T5Tokenizer,
    max_input_tokens: int,
    max_target_tokens: int,
    bad_lines: Literal["refuse", "skip"] = "refuse",
    long_lines: Literal["refuse", "truncate"] = "refuse",
) -> Pairs:
    """The pairs of a JSONL file whose objects have texts under "input" and "target".

    The maxima count the end id, which every sequence has, cut or not. Blank lines are ignored.

    Raises:
        PreparationError: the file cannot be read or holds no usable pair; or lines are bad, or
            longer than a maximum, and the option for it says "refuse".
    """
    path = Path(path)
    for option, maximum in (
        ("--encoder-seq-length", max_input_tokens),
        ("--decoder-seq-length", max_target_tokens),
    ):
        if maximum < 2:
            raise PreparationError(f"{option} {maximum}: must be 2 or more, a token and the end")
    reader = _Reader(path, tokenizer, max_input_tokens, max_target_tokens)
    try:
        file_state = _file_state(path)
        reader.read()
    except OSError as error:
        raise PreparationError(
            f"{path}: cannot be read ({error.strerror}): give a JSONL file of pairs"
        ) from None
    if reader.bad.count and bad_lines == "refuse":
        raise PreparationError(
            f"{reader.describe_bad()}: {reader.bad.reasons()}: correct them, or pass "
            "--bad-lines skip to leave them out"
        )
    if not reader.line_starts:
        raise PreparationError(
            f"{path}: holds no usable pair ({reader.bad.reasons() or 'it is empty'}): "
            'write one object a line, such as {"input": "a question", "target": "its answer"}'
        )
    too_long = reader.describe_long()
    if too_long and long_lines == "refuse":
        raise PreparationError(
            f"{'; '.join(too_long)}: raise the option, or pass --long-lines truncate to cut them"
        )
    remarks = [f"{remark}: truncated" for remark in too_long]
    if reader.bad.count:
        remarks.insert(0, f"{reader.describe_bad()}: left out: {reader.bad.reasons()}")
    return Pairs(path, file_state, reader.line_starts, reader.inputs, reader.targets, remarks)


def write_pairs(path: Path, pairs: Iterable[tuple[str, str]]) -> None:
    """Write inputs and targets as the file that `read_pairs` reads."""
    with path.open("w", encoding="utf-8") as stream:
        for text, target in pairs:
            stream.write(json.dumps({"input": text, "target": target}) + "\n")


def parse_pair(line: bytes) -> tuple[str, str]:
    """The input and the target of one line.

    Raises:
        PreparationError: the line holds no such pair; the message does not name the line.
    """
    value = parse_object(decode_line(line))
    return _text(value, "input"), _text(value, "target")


def decode_line(line: bytes) -> str:
    """The text of a line, without a byte order mark; PreparationError if it is not UTF-8."""
    try:
        return line.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise PreparationError(
            f"byte {error.start} (0x{line[error.start]:02x}) is not UTF-8"
        ) from None


def parse_object(line: str) -> dict[str, object]:
    """The JSON object of a line; PreparationError if it is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PreparationError(f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise PreparationError(f"a JSON {type(value).__name__}, not an object")
    return value


def _text(value: dict[str, object], key: str) -> str:
    if key not in value:
        raise PreparationError(f"no {key!r}")
    text = value[key]
    if not isinstance(text, str):
        raise PreparationError(f"{key!r} is a {type(text).__name__}, not a string")
    if not text.strip():
        raise PreparationError(f"{key!r} is empty")
    # JSON can escape half of a surrogate pair, which is no text to the tokenizer.
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise PreparationError(f"{key!r} has a lone surrogate, which is not valid Unicode")
    return text


@dataclass(frozen=True)
class _Line:
    number: int
    start: int
    input: str
    target: str


class _Reader:
    """Reads a whole file and says at the end what was found."""

    def __init__(
        self, path: Path, tokenizer: T5Tokenizer, max_input_tokens: int, max_target_tokens: int
    ) -> None:
        self._path, self._tokenizer = path, tokenizer
        self.inputs = TokenLists(max_input_tokens, tokenizer.eos_id)
        self.targets = TokenLists(max_target_tokens, tokenizer.eos_id)
        self.line_starts = array("q")
        self.num_lines = 0
        self.bad, self._long_inputs, self._long_targets = FoundLines(), FoundLines(), FoundLines()

    def read(self) -> None:
        """Read and encode every line."""
        threads = default_workers()
        for batch in itertools.batched(self._lines(), _BATCH_LINES):
            inputs = self._tokenizer.encode_batch([line.input for line in batch], threads)
            targets = self._tokenizer.encode_batch([line.target for line in batch], threads)
            for line, input_ids, target_ids in zip(batch, inputs, targets, strict=True):
                self._add(line, input_ids, target_ids)

    def _lines(self) -> Iterator[_Line]:
        start = 0
        with self._path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    self.num_lines += 1
                    try:
                        yield _Line(number, start, *parse_pair(line))
                    except PreparationError as error:
                        self.bad.add(number, str(error))
                start += len(line)

    def _add(self, line: _Line, input_ids: list[int], target_ids: list[int]) -> None:
        if not input_ids or not target_ids:
            # Normalization removes zero-width characters, for instance.
            empty = "target" if input_ids else "input"
            self.bad.add(line.number, f"the tokenizer finds nothing in {empty!r}")
            return
        if len(input_ids) >= self.inputs.max_tokens:
            self._long_inputs.add(line.number, f"{len(input_ids) + 1} tokens")
        if len(target_ids) >= self.targets.max_tokens:
            self._long_targets.add(line.number, f"{len(target_ids) + 1} tokens")
        self.inputs.append(input_ids)
        self.targets.append(target_ids)
        self.line_starts.append(line.start)

    def describe_bad(self) -> str:
        """How many lines hold no pair."""
        return f"{self.bad.count} of {self.num_lines} lines of {self._path} hold no pair"

    def describe_long(self) -> list[str]:
        """How many inputs and targets are longer than their maxima, and which."""
        return [
            f"{found.count} of {self.num_lines} lines of {self._path} have {what}s longer than "
            f"{option} {texts.max_tokens} ({found.reasons()})"
            for what, option, found, texts in (
                ("input", "--encoder-seq-length", self._long_inputs, self.inputs),
                ("target", "--decoder-seq-length", self._long_targets, self.targets),
            )
            if found.count
        ]


def _file_state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
