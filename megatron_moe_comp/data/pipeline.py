"""The preparation itself: :func:`prepare` takes options and leaves the files of a prefix.

The input is read up to three times (to check and split it, to train the tokenizer, to encode it),
so that it never has to fit in memory.
"""

import hashlib
import os
import sys
import time
import warnings
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_moe_comp.data import corpora, splits
from megatron_moe_comp.data.corpora import BadDocument, Corpus, Document
from megatron_moe_comp.data.encoding import AssignedText, encode_in_order
from megatron_moe_comp.data.errors import PreparationError
from megatron_moe_comp.data.options import PrepareOptions
from megatron_moe_comp.data.outputs import Manifest, Outputs, SplitStatistics
from megatron_moe_comp.data.rebuild import (
    CHANGED_WHILE_READ,
    Prepared,
    fingerprint_sources,
    log_to_stderr,
    make,
)
from megatron_moe_comp.data.tokenizer import (
    CONVENTIONS,
    DEFAULT_VOCAB_SIZE,
    load_tokenizer,
    read_tokenizer,
    sample_windows,
    train_tokenizer,
)

# Raised when the same options and inputs would give other files than before.
_FORMAT = 1

_BAD_DOCUMENTS_SHOWN = 20


@dataclass(frozen=True)
class Scan:
    """What the first reading found; ``splits`` has no tokens yet.

    ``split_of_document`` is the index into SPLIT_NAMES of each document that is not empty.
    """

    split_of_document: np.ndarray
    splits: dict[str, SplitStatistics]
    train_characters: int
    empty_documents: int
    bad_documents: list[str]


def prepare(
    options: PrepareOptions, log: Callable[[str], None] = log_to_stderr
) -> Prepared[Manifest]:
    """The files of ``options.output_prefix``, made unless they are there for these inputs.

    Raises:
        PreparationError: the options or inputs cannot be prepared.
        OSError: the files cannot be written, for instance on a full disk.
    """
    corpus = _find_corpus(options)
    model = None
    if options.tokenizer_model:
        needs = ("eos",) if options.model == "gpt" else ("eos", "pad", "sentinels")
        model = read_tokenizer(Path(options.tokenizer_model), needs)
    fingerprint = _fingerprint(options, corpus, model)
    outputs = Outputs(Path(options.output_prefix))
    _check_tokenizer_is_no_output(options, outputs)
    build = partial(_build, options=options, corpus=corpus, model=model, log=log)
    return make(outputs, Manifest, corpus, fingerprint, build, log)


def _find_corpus(options: PrepareOptions) -> Corpus:
    if options.inputs:
        return corpora.find_corpus(options.inputs, options.extensions)
    return corpora.standard_library()


def _check_tokenizer_is_no_output(options: PrepareOptions, outputs: Outputs) -> None:
    """Refuse to replace the user's model, which a kill at the wrong moment would lose."""
    given = options.tokenizer_model
    if given is not None and outputs.tokenizer.exists() and outputs.tokenizer.samefile(given):
        raise PreparationError(
            f"--tokenizer-model {given}: is itself a file of --output-prefix "
            f"{options.output_prefix}: give another prefix, or a copy of the model"
        )


def _fingerprint(options: PrepareOptions, corpus: Corpus, model: bytes | None) -> dict[str, Any]:
    """Everything that decides the files' content, as JSON keeps it; not the workers."""
    return {
        "format": _FORMAT,
        "inputs": fingerprint_sources(corpus),
        "model": options.model,
        "tokenizer_model": None if model is None else hashlib.sha256(model).hexdigest(),
        "vocab_size": (options.vocab_size or DEFAULT_VOCAB_SIZE) if model is None else None,
        "split": list(options.split),
        "seed": options.seed,
        "json_key": options.json_key,
        "skip_bad_input": options.skip_bad_input,
    }


def _build(
    built: Outputs,
    options: PrepareOptions,
    corpus: Corpus,
    model: bytes | None,
    fingerprint: dict[str, Any],
    log: Callable[[str], None],
) -> Manifest:
    """Write the tokenizer and the token files to ``built``; the manifest of what they hold."""
    scan = _scan(corpus, options, log)
    if model is None:
        vocab_size = options.vocab_size or DEFAULT_VOCAB_SIZE
        log(f"training a tokenizer of {vocab_size:,} pieces")
        began = time.monotonic()
        train_texts = (
            item.text
            for item in _assigned_texts(corpus, options, scan)
            if splits.SPLIT_NAMES[item.split] == "train"
        )
        windows = sample_windows(train_texts, scan.train_characters)
        model = train_tokenizer(windows, vocab_size, CONVENTIONS[options.model])
        log(f"trained the tokenizer in {time.monotonic() - began:.1f} s")
    built.tokenizer.write_bytes(model)
    processor = load_tokenizer(model)
    vocab_size = processor.get_piece_size()
    statistics, dtype = _write_token_files(built, options, corpus, scan, model)
    return Manifest(
        fingerprint=fingerprint,
        splits=statistics,
        vocab_size=vocab_size,
        end_of_document=processor.eos_id() if options.model == "gpt" else None,
        token_dtype=dtype,
        empty_documents=scan.empty_documents,
        ignored_files=corpus.ignored_files,
        bad_documents=scan.bad_documents,
    )


def _scan(corpus: Corpus, options: PrepareOptions, log: Callable[[str], None]) -> Scan:
    """Read everything once: find what is bad, and assign what is left to the splits."""
    hashes, sizes, characters = array("Q"), array("Q"), array("Q")
    empty_documents = 0
    bad_documents: list[str] = []

    def on_bad(bad: BadDocument) -> None:
        if not options.skip_bad_input:
            raise PreparationError(f"{bad}; or pass --skip-bad-input to leave such documents out")
        bad_documents.append(str(bad))

    with _progress("reading", _total_size(corpus)) as progress:
        for document in corpora.read_documents(corpus.sources, options.json_key, on_bad):
            progress.update(document.size)
            if _is_empty(document):
                empty_documents += 1
                continue
            hashes.append(splits.hash_name(document.name, options.seed))
            sizes.append(document.size)
            characters.append(len(document.text))
    for bad in bad_documents[:_BAD_DOCUMENTS_SHOWN]:
        log(f"skipped {bad}")
    if len(bad_documents) > _BAD_DOCUMENTS_SHOWN:
        log(f"skipped {len(bad_documents) - _BAD_DOCUMENTS_SHOWN} more, listed in the manifest")
    if not hashes:
        raise PreparationError(
            f"the input holds no text: {empty_documents} empty and {len(bad_documents)} bad "
            "documents: give files with text"
        )
    split_of_document = splits.assign_splits(hashes, options.split)
    split_sizes = np.bincount(split_of_document, weights=sizes, minlength=len(splits.SPLIT_NAMES))
    split_counts = np.bincount(split_of_document, minlength=len(splits.SPLIT_NAMES))
    return Scan(
        split_of_document=split_of_document,
        splits={
            name: SplitStatistics(documents=int(split_counts[i]), bytes=int(split_sizes[i]))
            for i, name in enumerate(splits.SPLIT_NAMES)
        },
        train_characters=int(np.asarray(characters)[split_of_document == 0].sum()),
        empty_documents=empty_documents,
        bad_documents=bad_documents,
    )


def _assigned_texts(corpus: Corpus, options: PrepareOptions, scan: Scan) -> Iterator[AssignedText]:
    """The documents of the scan again, each with its split.

    Raises:
        PreparationError: the files hold another number of documents than at the scan.
    """
    count = 0
    documents = corpora.read_documents(corpus.sources, options.json_key, on_bad=lambda _: None)
    for document in documents:
        if _is_empty(document):
            continue
        if count == len(scan.split_of_document):
            raise PreparationError(CHANGED_WHILE_READ)
        split = int(scan.split_of_document[count])
        yield AssignedText(split, document.text, document.size)
        count += 1
    if count != len(scan.split_of_document):
        raise PreparationError(CHANGED_WHILE_READ)


def _write_token_files(
    built: Outputs, options: PrepareOptions, corpus: Corpus, scan: Scan, model: bytes
) -> tuple[dict[str, SplitStatistics], str]:
    """Encode every document into its split's pair; the splits' statistics and the ids' dtype."""
    # Here and not above, because importing Megatron takes seconds and most runs find nothing to do;
    # it warns of GPU libraries that this does not need.
    with warnings.catch_warnings(action="ignore"):
        from megatron_moe_comp.data.token_files import TokenFileWriter, token_dtype

    processor = load_tokenizer(model)
    dtype = token_dtype(processor.get_piece_size())
    names = [name for name in splits.SPLIT_NAMES if scan.splits[name].documents]
    writers = {name: TokenFileWriter(built.bin(name), built.idx(name), dtype) for name in names}
    tokens, unknown_tokens = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    texts = _assigned_texts(corpus, options, scan)
    documents = encode_in_order(texts, options.model, model, dtype, options.workers)
    total_size = sum(split.bytes for split in scan.splits.values())
    with _progress("encoding", total_size) as progress:
        for item, document in documents:
            name = splits.SPLIT_NAMES[item.split]
            writers[name].add(document)
            tokens[name] += len(document.ids)
            unknown_tokens[name] += int(np.count_nonzero(document.ids == processor.unk_id()))
            progress.update(item.size)
    for writer in writers.values():
        writer.close()
    statistics = {
        name: SplitStatistics(
            scan.splits[name].documents, scan.splits[name].bytes, tokens[name], unknown_tokens[name]
        )
        for name in names
    }
    return statistics, dtype


def _is_empty(document: Document) -> bool:
    """Whether there is nothing to learn from: no text, or white space only."""
    return not document.text.strip()


def _total_size(corpus: Corpus) -> int:
    return sum(os.path.getsize(source.path) for source in corpus.sources if source.path.exists())


def _progress(what: str, total_bytes: int) -> "tqdm[None]":
    """A bar on a terminal; elsewhere a line every ten seconds at most."""
    return tqdm(
        desc=what,
        total=total_bytes,
        unit="B",
        unit_scale=True,
        file=sys.stderr,
        ascii=not sys.stderr.isatty(),
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    )
