"""Documents to token ids, in worker processes, with the results in the documents' order."""

import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np

from megatron_moe_comp.data.errors import PreparationError
from megatron_moe_comp.data.tokenizer import load_tokenizer

BATCH_CHARACTERS = 256 * 1024
# Megatron leaves out documents with a sequence of more than 512, and cuts a sample that whole
# sequences overfill: the shorter they are, the less is lost.
MAX_SEQUENCE_TOKENS = 128


@dataclass(frozen=True)
class AssignedText:
    """A document's text, the index of its split, and its length in UTF-8 bytes."""

    split: int
    text: str
    size: int


@dataclass(frozen=True)
class EncodedDocument:
    """A document's ids and the lengths of the sequences they are divided into."""

    ids: np.ndarray
    sequence_lengths: list[int]


class GptEncoder:
    """Encodes texts with one SentencePiece model into ids of one numpy dtype."""

    def __init__(self, model: bytes, dtype: str) -> None:
        self._processor = load_tokenizer(model)
        self._dtype = dtype

    def encode(self, text: str) -> EncodedDocument:
        """The ids of ``text`` followed by the end-of-document id, as one sequence."""
        ids = self._processor.encode(text)
        ids.append(self._processor.eos_id())
        return EncodedDocument(np.array(ids, dtype=self._dtype), [len(ids)])


class T5Encoder:
    """Encodes texts line by line: Megatron's span corruption fills samples with whole sequences."""

    def __init__(self, model: bytes, dtype: str) -> None:
        self._processor = load_tokenizer(model)
        self._dtype = dtype

    def encode(self, text: str) -> EncodedDocument:
        """The ids of ``text``, without an end, one sequence for each line that is not blank.

        Blank lines belong to the line before them. Lines of more than MAX_SEQUENCE_TOKENS are
        several sequences.
        """
        sequences = [
            line_ids[start : start + MAX_SEQUENCE_TOKENS]
            for line_ids in self._processor.encode(split_lines(text), num_threads=1)
            for start in range(0, len(line_ids), MAX_SEQUENCE_TOKENS)
        ]
        ids = np.fromiter(itertools.chain.from_iterable(sequences), self._dtype)
        return EncodedDocument(ids, list(map(len, sequences)))


ENCODERS: dict[str, type[GptEncoder | T5Encoder]] = {"gpt": GptEncoder, "t5": T5Encoder}


def split_lines(text: str) -> list[str]:
    r"""``text`` in pieces that end with a line end and are not blank, but for all of it.

    Example: "a\n\n b\n" -> ["a\n\n", " b\n"].
    """
    pieces: list[str] = []
    for line in text.splitlines(keepends=True):
        if pieces and (not line.strip() or not pieces[-1].strip()):
            pieces[-1] += line
        else:
            pieces.append(line)
    return pieces


def make_batches(texts: Iterable[AssignedText]) -> Iterator[list[AssignedText]]:
    """``texts`` in lists of about BATCH_CHARACTERS, in order."""
    batch: list[AssignedText] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def encode_in_order(
    texts: Iterable[AssignedText], encoder: str, model: bytes, dtype: str, workers: int
) -> Iterator[tuple[AssignedText, EncodedDocument]]:
    """Each text with its ids; order and ids do not depend on ``workers``.

    ``encoder`` is one of ENCODERS.

    One worker encodes in this process. More are spawned, hence a calling script needs the usual
    ``if __name__ == "__main__"``. At most a few batches per worker are in memory.

    Raises:
        PreparationError: a worker died.
    """
    if workers == 1:
        own_encoder = ENCODERS[encoder](model, dtype)
        for text in texts:
            yield text, own_encoder.encode(text.text)
        return
    pool = ProcessPoolExecutor(
        workers,
        # A fork of a process that has imported torch may hold locks of its threads.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(encoder, model, dtype),
    )
    try:
        for batch, future in _submit_ahead(pool, make_batches(texts), ahead=2 * workers):
            yield from zip(batch, future.result(), strict=True)
    except BrokenProcessPool:
        raise PreparationError(
            f"--workers {workers}: a worker process died, most often for lack of memory: "
            "pass a smaller --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _submit_ahead(
    pool: ProcessPoolExecutor, batches: Iterable[list[AssignedText]], ahead: int
) -> Iterator[tuple[list[AssignedText], "Future[list[EncodedDocument]]"]]:
    """Each batch with the future of its ids, oldest first, at most ``ahead`` at work."""
    pending: deque[tuple[list[AssignedText], Future[list[EncodedDocument]]]] = deque()
    for batch in batches:
        pending.append((batch, pool.submit(_encode_batch, [text.text for text in batch])))
        if len(pending) > ahead:
            yield pending.popleft()
    yield from pending


# Set once in each worker process by _start_worker, and nowhere else.
_worker_encoder: GptEncoder | T5Encoder


def _start_worker(encoder: str, model: bytes, dtype: str) -> None:
    """Prepare a worker: its encoder, and its end with its parent's."""
    global _worker_encoder
    _worker_encoder = ENCODERS[encoder](model, dtype)
    # The parent answers Ctrl-C for all.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    # Workers hold both ends of the task pipe, so a killed parent would leave them waiting on it.
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _encode_batch(texts: list[str]) -> list[EncodedDocument]:
    return [_worker_encoder.encode(text) for text in texts]
