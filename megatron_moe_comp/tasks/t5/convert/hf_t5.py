"""Converts a Hugging Face T5, T5 1.1 or Flan-T5 to a checkpoint for finetune_t5_moe.py.

    python -m megatron_moe_comp.tasks.t5.convert.hf_t5 --input flan-t5-base --output out

Nothing is downloaded. The checkpoint is dense, in float32, and loads with every tensor parallel
size that divides heads and vocabulary.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import T5Config

from megatron_moe_comp.data.errors import PreparationError
from megatron_moe_comp.tasks.t5.convert.hf_t5_files import (
    ACTIVATIONS,
    TOKENIZER,
    ConversionError,
    read_config,
    read_tensors,
    read_tokenizer,
)
from megatron_moe_comp.tasks.t5.convert.t5_weights import HEAD_OF_MEGATRON, megatron_t5_weights

_PROGRAM = "python -m megatron_moe_comp.tasks.t5.convert.hf_t5"
MODEL_ARGS = "model.args"


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Convert a Hugging Face T5, T5 1.1 or Flan-T5 to a Megatron checkpoint.",
        epilog=f"Writes the checkpoint, {MODEL_ARGS} with the flags of the model, and {TOKENIZER}, "
        "the tokenizer with its sentinels, if there is one.",
    )
    parser.add_argument(
        "--input",
        type=Path,
        required=True,
        metavar="DIR",
        help="directory with config.json and model.safetensors or pytorch_model.bin, whole or in "
        f"shards, and {TOKENIZER}",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="directory to write, for --load; must not hold anything",
    )
    return parser


def convert(source: Path, output: Path) -> None:
    """Writes the checkpoint of the model in `source`, and says what it wrote.

    Raises:
        ConversionError: a directory cannot be used, or the model is not T5's.
        PreparationError: the tokenizer cannot be used.
    """
    _check_output(output)
    config = read_config(source)
    tokenizer = read_tokenizer(source, config.vocab_size)
    weights = megatron_t5_weights(config, read_tensors(source))
    flags = model_flags(config, HEAD_OF_MEGATRON not in weights)
    output.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        (output / TOKENIZER).write_bytes(tokenizer)
        flags += ["--tokenizer-type", "SentencePieceTokenizer"]
        flags += ["--tokenizer-model", str(output / TOKENIZER)]
    # Importing Megatron takes seconds, which a refusal need not wait for.
    from megatron_moe_comp.tasks.t5.convert.t5_checkpoint import save_t5

    num_weights = save_t5(flags, weights, output)
    (output / MODEL_ARGS).write_text(" ".join(flags) + "\n")
    print(f"wrote {output}: {num_weights:,} weights. Flags of the model, in {output}/{MODEL_ARGS}:")
    print("  " + " ".join(flags))
    if tokenizer is None:
        print(f"{source} has no {TOKENIZER}: add --tokenizer-type and --tokenizer-model yourself")


def model_flags(config: T5Config, tied: bool) -> list[str]:
    """Returns the flags of Megatron and finetune_t5_moe.py that describe the model."""
    values = {
        "num-layers": config.num_layers,
        "decoder-num-layers": config.num_decoder_layers,
        "hidden-size": config.d_model,
        "ffn-hidden-size": config.d_ff,
        "num-attention-heads": config.num_heads,
        "kv-channels": config.d_kv,
        "normalization": "RMSNorm",
        "norm-epsilon": f"{config.layer_norm_epsilon:g}",
        "relative-attention-num-buckets": config.relative_attention_num_buckets,
        "relative-attention-max-distance": config.relative_attention_max_distance,
        # Rounded up from the tokenizer's it would depend on the tensor parallel size, and the rows
        # that the checkpoint lacks would take part in the softmax.
        "padded-vocab-size": config.vocab_size,
        "t5-activation": ACTIVATIONS[config.feed_forward_proj],
    }
    flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    flags += ["--t5-relative-positions", "--disable-bias-linear"]
    return flags if tied else [*flags, "--untie-embeddings-and-output-weights"]


def _check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConversionError(
            f"--output {output}: holds something already. Give a new or empty directory."
        )
    if len(str(output).split()) != 1:
        raise ConversionError(
            f"--output {str(output)!r}: has a space, at which the shell would divide the flags of "
            f"$(cat {MODEL_ARGS}). Give a directory without."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 for what the user can put right."""
    args = build_parser().parse_args(arguments)
    try:
        convert(args.input, args.output)
    except (ConversionError, PreparationError) as error:
        print(f"hf_t5: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
