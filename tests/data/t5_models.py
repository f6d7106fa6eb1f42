"""Tokenizers of both kinds that T5 is used with, and pair files to read with them."""

import io
import json

import sentencepiece

from megatron_moe_comp.data.tokenizer import T5, train_tokenizer

SOURCE = "class Thing:\n\tdef method(self, a):\n        return [a,  a + 1]\n\n" * 20
TRAINED = train_tokenizer([SOURCE], 460, T5)


def train_like_released() -> bytes:
    """A unigram model with T5's normalization and ids, and no sentinels: as a spiece.model is."""
    model = io.BytesIO()
    text = "the theme of this thesis: a method, other methods and a thing to return"
    lines = [text[i % 31 :] + " " + text[: i % 23] for i in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="unigram",
        vocab_size=60,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def write_pairs(path, pairs):
    lines = [json.dumps({"input": text, "target": target}) for text, target in pairs]
    path.write_text("".join(line + "\n" for line in lines))
    return path
