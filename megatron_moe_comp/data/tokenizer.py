"""SentencePiece models: training one for source code and text, and checking a given one.

The trained model is what ``--tokenizer-type SentencePieceTokenizer --tokenizer-model`` takes. Its
first ids are those of a :class:`Convention`, then come the bytes: for GPT <unk>, <s>, </s> and
<pad>, Megatron's end of document, ``.eod``, being </s>; for T5 <pad>, </s> and <unk>, and at the
end of the vocabulary the sentinels. Text comes back exactly, tabs, newlines and runs of spaces
included, with one exception that is SentencePiece's own: U+2581, its sign for a space, comes back
as a space.
"""

import io
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from megatron_moe_comp.data.errors import PreparationError

DEFAULT_VOCAB_SIZE = 4096


@dataclass(frozen=True)
class Convention:
    """The special ids of a tokenizer, -1 for none, and how many sentinel pieces end it."""

    unk_id: int
    bos_id: int
    eos_id: int
    pad_id: int
    num_sentinels: int


GPT = Convention(unk_id=0, bos_id=1, eos_id=2, pad_id=3, num_sentinels=0)
# As in the released T5 tokenizers: decoding starts with <pad>, so there is no <s>.
T5 = Convention(unk_id=2, bos_id=-1, eos_id=1, pad_id=0, num_sentinels=100)
CONVENTIONS = {"gpt": GPT, "t5": T5}

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


def sentinel(index: int) -> str:
    """The piece that stands for the masked span of this index."""
    return f"<extra_id_{index}>"


def train_tokenizer(windows: Iterable[str], vocab_size: int, convention: Convention = GPT) -> bytes:
    """A serialized SentencePiece BPE model; the same windows give the same bytes.

    ``vocab_size`` includes the sentinels.

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
            # Only from the special ids up does the trainer say how many pieces it needs.
            vocab_size=max(4, vocab_size - convention.num_sentinels),
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            # Pieces for indentation and for names such as "__init__".
            allow_whitespace_only_pieces=True,
            split_by_unicode_script=False,
            max_sentence_length=4 * WINDOW_CHARACTERS,
            unk_id=convention.unk_id,
            bos_id=convention.bos_id,
            eos_id=convention.eos_id,
            pad_id=convention.pad_id,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        message = _explain_training_error(str(error), vocab_size, convention.num_sentinels)
        raise PreparationError(message) from error
    return add_sentinels(model.getvalue(), convention.num_sentinels)


def add_sentinels(model: bytes, count: int) -> bytes:
    """The serialized ``model`` with the pieces <extra_id_0>, <extra_id_1>, ... at its end.

    They are numbered downwards, as Hugging Face does: a released T5 model of 32000 pieces gets
    <extra_id_99> as 32000 and <extra_id_0> as 32099. A model that has them comes back unchanged.

    Raises:
        PreparationError: the model has some of them, but not all.
    """
    processor = load_tokenizer(model)
    wanted = [sentinel(index) for index in reversed(range(count))]
    present = [piece for piece in wanted if has_piece(processor, piece)]
    if present == wanted:
        return model
    if present:
        raise PreparationError(
            f"the tokenizer has {len(present)} of the {count} pieces {wanted[-1]} to {wanted[0]}: "
            "give a model with all of them or none"
        )
    return model + b"".join(map(_serialize_user_defined, wanted))


def _serialize_user_defined(piece: str) -> bytes:
    """A piece in Protocol Buffers' format, in which appending to a message adds to its lists.

    By hand because sentencepiece_model_pb2 imports with few versions of protobuf only. In
    sentencepiece_model.proto: ModelProto.pieces is field 1, SentencePiece's are piece = 1,
    score = 2 and type = 3 with USER_DEFINED = 4.
    """
    text = piece.encode()
    fields = bytes([0x0A, len(text)]) + text + b"\x15" + struct.pack("<f", 0.0) + b"\x18\x04"
    return bytes([0x0A, len(fields)]) + fields


def has_piece(processor: sentencepiece.SentencePieceProcessor, piece: str) -> bool:
    """Whether ``piece`` is in the vocabulary."""
    return processor.id_to_piece(processor.piece_to_id(piece)) == piece


_TRAIN_ONE = "leave the option out to train one"
_NEEDS: dict[str, tuple[Callable[[sentencepiece.SentencePieceProcessor], bool], str]] = {
    "eos": (
        lambda processor: processor.eos_id() >= 0,
        "no end-of-sentence id, which ends each document or sequence: train it with an eos_id",
    ),
    "pad": (
        lambda processor: processor.pad_id() >= 0,
        "no padding id, with which T5's decoding starts: train it with a pad_id",
    ),
    "sentinels": (
        lambda processor: has_piece(processor, sentinel(0)),
        f"no piece {sentinel(0)} for masked spans: add them with "
        "python -m megatron_moe_comp.data.t5_tokenizer",
    ),
}


def read_tokenizer(
    path: Path, needs: Sequence[str] = ("eos",), otherwise: str = _TRAIN_ONE
) -> bytes:
    """The bytes of an existing model, checked to have what ``needs`` says: eos, pad, sentinels.

    ``otherwise`` is what a user without such a model can do.

    Raises:
        PreparationError: the file cannot be read, is no SentencePiece model, or lacks something.
    """
    try:
        model = path.read_bytes()
    except OSError as error:
        raise PreparationError(
            f"--tokenizer-model {path}: cannot be read ({error.strerror}): give the path of a "
            f"SentencePiece model, or {otherwise}"
        ) from None
    try:
        processor = load_tokenizer(model)
    except RuntimeError:
        raise PreparationError(
            f"--tokenizer-model {path}: not a SentencePiece model: give a file that "
            f"SentencePiece wrote, or {otherwise}"
        ) from None
    for need in needs:
        is_met, lack = _NEEDS[need]
        if not is_met(processor):
            raise PreparationError(
                f"--tokenizer-model {path}: the model has {lack}, or {otherwise}"
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


def _explain_training_error(message: str, vocab_size: int, num_sentinels: int) -> str:
    if match := _SMALLER_THAN_REQUIRED.search(message):
        needed = int(match[1]) + num_sentinels
        return (
            f"--vocab-size {vocab_size}: the special tokens, the 256 bytes and the characters of "
            f"the training text need {needed}: pass --vocab-size {needed} or more"
        )
    if match := _TOO_HIGH.search(message):
        filled = int(match[1]) + num_sentinels
        return (
            f"--vocab-size {vocab_size}: the training text fills only {filled}: pass "
            f"--vocab-size {filled} or less, or give more text"
        )
    if "sentences_.empty()" in message or "all_chars_count" in message:
        return "the training documents hold no text to train a tokenizer on: give more text"
    return f"--vocab-size {vocab_size}: SentencePiece cannot train a tokenizer: {message}"
