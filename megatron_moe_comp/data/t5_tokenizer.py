"""What a T5 model and its data need of a SentencePiece model; and the sentinels added to one.

A released T5 model file has no sentinels, Hugging Face adds them elsewhere. To add them:

    python -m megatron_moe_comp.data.t5_tokenizer spiece.model t5_tokenizer.model
"""

import argparse
import hashlib
import sys
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import count, takewhile
from pathlib import Path

from megatron_moe_comp.data.errors import run_command
from megatron_moe_comp.data.tokenizer import (
    T5,
    add_sentinels,
    has_piece,
    load_tokenizer,
    read_tokenizer,
    sentinel,
)

_OTHERWISE = "train one with python -m megatron_moe_comp.data.prepare --model t5"


class T5Tokenizer:
    """Text to ids and back by T5's convention; the ids are those of the model in ``model_path``.

    ``sentinel_ids`` are the ids of <extra_id_0>, <extra_id_1>, ... as far as the model has them.
    The attributes named as Megatron names them (``bos``, ``eos``, ``pad``, ``mask``, ...) are what
    its T5MaskedWordPieceDataset and MegatronDataset read.

    Raises:
        PreparationError: the file is no SentencePiece model, or has no padding or end id.
    """

    # T5 has none of the three. Megatron compares tokens with cls and sep, and puts mask where a
    # sentinel will stand; no token is negative, and -1 already marks labels to ignore.
    mask, cls, sep = -2, -3, -4

    def __init__(self, model_path: str) -> None:
        model = read_tokenizer(Path(model_path), ("eos", "pad"), _OTHERWISE)
        self._processor = load_tokenizer(model)
        self.vocab_size: int = self._processor.get_piece_size()
        self.pad_id: int = self._processor.pad_id()
        self.eos_id: int = self._processor.eos_id()
        # What T5's decoder begins with.
        self.start_id = self.pad_id
        sentinels = takewhile(
            lambda piece: has_piece(self._processor, piece), map(sentinel, count())
        )
        self.sentinel_ids: list[int] = [self._processor.piece_to_id(piece) for piece in sentinels]
        self.bos, self.eos, self.pad = self.start_id, self.eos_id, self.pad_id
        self.additional_special_tokens_ids = self.sentinel_ids
        # Names the dataset's cached sample index: the model's content decides, not its path.
        self.unique_identifiers = OrderedDict(
            {"class": type(self).__name__, "model": hashlib.sha256(model).hexdigest()}
        )
        # T5 masks pieces, not words. Megatron takes "##" for the continuation of a word, as in
        # BERT's vocabularies; a piece that does begin so, of a comment perhaps, is hidden from it.
        pieces = (self._processor.id_to_piece(id_) for id_ in range(self.vocab_size))
        self.inv_vocab = {
            id_: f" {piece}" if piece.startswith("##") else piece
            for id_, piece in enumerate(pieces)
        }

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without an end."""
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str], num_threads: int) -> list[list[int]]:
        """The ids of each text, without ends."""
        return self._processor.encode(list(texts), num_threads=num_threads)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids`` up to the first end, without padding.

        Ids past the vocabulary, to which Megatron pads a model's output layer, have no text either.
        """
        until_end = takewhile(lambda id_: id_ != self.eos_id, map(int, ids))
        return self._processor.decode(
            [id_ for id_ in until_end if id_ != self.pad_id and id_ < self.vocab_size]
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the process's exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_moe_comp.data.t5_tokenizer",
        description="Add the pieces for masked spans to a SentencePiece model that has none.",
    )
    parser.add_argument("model", type=Path, help="such as a released T5's spiece.model")
    parser.add_argument("output", type=Path, help="where the model with them is written")
    args = parser.parse_args(arguments)

    def run() -> None:
        model = read_tokenizer(args.model, ("eos", "pad"), _OTHERWISE)
        args.output.write_bytes(add_sentinels(model, T5.num_sentinels))
        print(f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {args.output}")

    return run_command("t5_tokenizer", run)


if __name__ == "__main__":
    sys.exit(main())
