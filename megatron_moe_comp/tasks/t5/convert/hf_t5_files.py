"""Reads a Hugging Face directory of T5, T5 1.1 or Flan-T5: configuration, tensors, tokenizer."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import T5Config

from megatron_moe_comp.data.tokenizer import add_sentinels, load_tokenizer

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
TOKENIZER = "spiece.model"
ACTIVATIONS = {"relu": "relu", "gated-gelu": "geglu"}
"""--t5-activation of each feed_forward_proj."""


class ConversionError(ValueError):
    """A model that cannot be converted; the message says what, its value, and the remedy."""


def read_config(directory: Path) -> T5Config:
    """Returns the model's configuration.

    Raises:
        ConversionError: there is none, or it is not T5's.
    """
    values = _read_json(directory / "config.json")
    if values.get("model_type") != "t5":
        raise ConversionError(
            f"{directory}/config.json: model_type is {values.get('model_type')!r}, and 't5' alone "
            "can be converted. Give a directory of T5, T5 1.1 or Flan-T5."
        )
    feed_forward = values.get("feed_forward_proj", "relu")
    if feed_forward not in ACTIVATIONS:
        raise ConversionError(
            f"{directory}/config.json: feed_forward_proj is {feed_forward!r}, and only "
            f"{' and '.join(ACTIVATIONS)} can be converted. Give a directory of T5, T5 1.1 or "
            "Flan-T5."
        )
    return T5Config.from_dict(values)


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Returns the model's tensors by their names, as the files hold them, shards put together.

    Raises:
        ConversionError: there are no weights, or a shard is missing.
    """
    for name in WEIGHTS:
        index = directory / f"{name}.index.json"
        if (directory / name).is_file():
            return _read_file(directory / name)
        if index.is_file():
            shards = sorted(set(_read_json(index)["weight_map"].values()))
            return {k: v for shard in shards for k, v in _read_file(directory / shard).items()}
    raise ConversionError(
        f"{directory}: has no weights. Put one of {', '.join(WEIGHTS)} there, or the shards and "
        "the .index.json of one."
    )


def read_tokenizer(directory: Path, vocab_size: int) -> bytes | None:
    """Returns the SentencePiece model with its sentinels as pieces, or None where there is none.

    Raises:
        ConversionError: it has more pieces than the model has embeddings.
    """
    path = directory / TOKENIZER
    if not path.is_file():
        return None
    options = directory / "tokenizer_config.json"
    sentinels = _read_json(options).get("extra_ids", 100) if options.is_file() else 100
    model = add_sentinels(path.read_bytes(), sentinels)
    pieces = load_tokenizer(model).vocab_size()
    if pieces > vocab_size:
        raise ConversionError(
            f"{path}: has {pieces} pieces with its {sentinels} sentinels, and the model only "
            f"{vocab_size} embeddings. Give the tokenizer that the model was trained with."
        )
    return model


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ConversionError(
            f"{path}: is missing, and the index of the weights names it. Complete the directory."
        )
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise ConversionError(
            f"{path}: cannot be read ({error.strerror}). Give --input the directory of a Hugging "
            "Face T5."
        ) from None
    except json.JSONDecodeError as error:
        raise ConversionError(f"{path}: is not JSON ({error}). Fetch the file again.") from None
