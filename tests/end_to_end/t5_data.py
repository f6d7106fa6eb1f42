"""A task that a tiny T5 learns a little of in a few steps: the alphabet up to a letter."""

import json
import random

from megatron_moe_comp.data.tokenizer import T5, train_tokenizer

ALPHABET = "abcdefgh"
LINES = {"train": 200, "valid": 11, "test": 7}


def target(letter):
    return " ".join(ALPHABET[: ALPHABET.index(letter) + 1])


def write(directory):
    """Returns the flags of a tokenizer and of JSONL files that it writes."""
    draw = random.Random(1)
    model = train_tokenizer([f"up to: {target('h')}"] * 20, 385, T5)
    path = directory / "pairs_tokenizer.model"
    path.write_bytes(model)
    flags = [f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {path}"]
    for split, number in LINES.items():
        path = directory / f"pairs_{split}.jsonl"
        letters = draw.choices(ALPHABET, k=number)
        lines = [json.dumps({"input": f"up to: {x}", "target": target(x)}) for x in letters]
        path.write_text("".join(line + "\n" for line in lines))
        flags.append(f"--{split}-data-path {path}")
    return " ".join(flags)
