"""SentencePiece models: training one for source code and text, and checking a given one.

The trained model is what ``--tokenizer-type SentencePieceTokenizer --tokenizer-model`` takes:
ids 0 to 3 are <unk>, <s>, </s> and <pad>, 4 to 259 the bytes; Megatron's end of document, ``.eod``,
is </s>. Text comes back exactly, tabs, newlines and runs of spaces included, with one exception
that is SentencePiece's own: U+2581, its sign for a space, comes back as a space.
"""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from megatron_moe_comp.data.errors import PreparationError

DEFAULT_VOCAB_SIZE = 4096

# A window keeps its newlines, so that pieces such as "):\n" can be learnt.
WINDOW_CHARACTERS = 4096
# Byte-pair merges hardly change beyond this much text, and training stays within seconds.
SAMPLE_CHARACTERS = 24 * 2**20

_SMALLER_THAN_REQUIRED = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")
_TOO_HIGH = re.compile(r"Vocabulary size too high \(\d+\).*<= (\d+)")


def sample_windows(
    texts: Iterable[str], total_characters: int, budget: int = SAMPLE_CHARACTERS
) -> Iterator[str]:
    """Windows of ``texts`` for training: all of them, or evenly spread ones up to ``budget``.

    ``total_characters`` is the length of all texts together; the choice depends on it and on the
    windows' positions alone.
    """
    passed = taken = 0
    for text in texts:
        for start in range(0, len(text), WINDOW_CHARACTERS):
            window = text[start : start + WINDOW_CHARACTERS]
            # Take whenever less than the budget's share of what has passed was taken.
            if taken * total_characters <= passed * budget:
                taken += len(window)
                # The trainer drops a whole window for one NUL.
                yield window.replace("\0", "")
            passed += len(window)


def train_tokenizer(windows: Iterable[str], vocab_size: int) -> bytes:
    """A serialized SentencePiece BPE model; the same windows give the same bytes.

    Raises:
        PreparationError: ``vocab_size`` is too small for the text's characters or more than its
            words can fill, or there is no text.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(windows),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            # Pieces for indentation and for names such as "__init__".
            allow_whitespace_only_pieces=True,
            split_by_unicode_script=False,
            max_sentence_length=4 * WINDOW_CHARACTERS,
            pad_id=3,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise PreparationError(_explain_training_error(str(error), vocab_size)) from error
    return model.getvalue()


def read_tokenizer(path: Path) -> bytes:
    """The bytes of an existing model, checked to be one that can end documents.

    Raises:
        PreparationError: the file cannot be read, is no SentencePiece model, or has no
            end-of-sentence id.
    """
    try:
        model = path.read_bytes()
    except OSError as error:
        raise PreparationError(
            f"--tokenizer-model {path}: cannot be read ({error.strerror}): give the path of a "
            "SentencePiece model, or leave the option out to train one"
        ) from None
    try:
        processor = load_tokenizer(model)
    except RuntimeError:
        raise PreparationError(
            f"--tokenizer-model {path}: not a SentencePiece model: give a file that "
            "SentencePiece wrote, or leave the option out to train one"
        ) from None
    if processor.eos_id() < 0:
        raise PreparationError(
            f"--tokenizer-model {path}: the model has no end-of-sentence id, which Megatron puts "
            "after each document: train it with an eos_id, or leave the option out to train one"
        )
    return model


def load_tokenizer(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """The processor of a serialized model.

    Raises:
        RuntimeError: ``model`` is no SentencePiece model.
    """
    if not model:
        # SentencePiece takes empty bytes for "no model yet" and fails at use.
        raise RuntimeError("the model is empty")
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def _explain_training_error(message: str, vocab_size: int) -> str:
    if match := _SMALLER_THAN_REQUIRED.search(message):
        return (
            f"--vocab-size {vocab_size}: the special tokens, the 256 bytes and the characters of "
            f"the training text need {match[1]}: pass --vocab-size {match[1]} or more"
        )
    if match := _TOO_HIGH.search(message):
        return (
            f"--vocab-size {vocab_size}: the training text fills only {match[1]}: pass "
            f"--vocab-size {match[1]} or less, or give more text"
        )
    if "sentences_.empty()" in message or "all_chars_count" in message:
        return "the training documents hold no text to train a tokenizer on: give more text"
    return f"--vocab-size {vocab_size}: SentencePiece cannot train a tokenizer: {message}"
