"""A task that a tiny T5 learns a little of in a few steps: letters in the opposite order."""

import json
import random

from megatron_moe_comp.data.tokenizer import T5, train_tokenizer

WORDS = "abcdef"
LINES = {"train": 200, "valid": 11, "test": 7}


def write(directory):
    """Returns the flags of a tokenizer and JSONL files that it writes."""
    draw = random.Random(1)
    model = train_tokenizer([" ".join(WORDS) + " reverse:"] * 20, 420, T5)
    (directory / "tokenizer.model").write_bytes(model)
    flags = [
        f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {directory}/tokenizer.model"
    ]
    for split, number in LINES.items():
        path = directory / f"{split}.jsonl"
        with path.open("w") as stream:
            for _ in range(number):
                words = draw.choices(WORDS, k=draw.randint(1, 3))
                pair = {"input": " ".join(["reverse:", *words]), "target": " ".join(words[::-1])}
                stream.write(json.dumps(pair) + "\n")
        flags.append(f"--{split}-data-path {path}")
    return " ".join(flags)
