"""Prepares text for training: one command from files to a tokenizer and Megatron's token files.

    python -m megatron_moe_comp.data.prepare --output-prefix data/stdlib
    python -m megatron_moe_comp.data.prepare --input notes/ more.jsonl --output-prefix data/mine
    python -m megatron_moe_comp.data.prepare --model t5 --output-prefix data/stdlib_t5

A second run with the same options and unchanged input returns at once; a run that was killed is
run again.
"""

import argparse
import sys
from collections.abc import Sequence

from megatron_moe_comp.data.corpora import DIRECTORY_EXTENSIONS
from megatron_moe_comp.data.errors import run_command
from megatron_moe_comp.data.options import PrepareOptions, default_workers
from megatron_moe_comp.data.outputs import Manifest
from megatron_moe_comp.data.pipeline import prepare
from megatron_moe_comp.data.rebuild import Prepared
from megatron_moe_comp.data.splits import parse_split
from megatron_moe_comp.data.tokenizer import CONVENTIONS, DEFAULT_VOCAB_SIZE

_PROGRAM = "python -m megatron_moe_comp.data.prepare"


def build_parser() -> argparse.ArgumentParser:
    """The command line; :class:`PrepareOptions` says what each option means and allows."""
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Train a tokenizer on text and write the text in Megatron's .bin/.idx format.",
        epilog="Writes PREFIX_tokenizer.model and PREFIX_{train,valid,test}.{bin,idx}, and last "
        "PREFIX_manifest.json; the .bin/.idx pairs go to --train-data-path and its sisters.",
    )
    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help="text files (one document each), .jsonl or .json files (one object a line), and "
        "directories of them, read recursively without hidden files; "
        "default: the source text of this Python's standard library",
    )
    parser.add_argument(
        "--output-prefix", required=True, metavar="PREFIX", help="beginning of every output path"
    )
    parser.add_argument(
        "--model",
        choices=list(CONVENTIONS),
        default="gpt",
        help="gpt: documents that end with </s>; t5: a tokenizer with <pad>, </s> and 100 "
        "sentinels, and documents as a sequence a line, for span corruption (default: %(default)s)",
    )
    parser.add_argument(
        "--tokenizer-model",
        metavar="PATH",
        help="existing SentencePiece model; default: train one on the training documents",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help=f"number of pieces of the trained tokenizer (default: {DEFAULT_VOCAB_SIZE})",
    )
    parser.add_argument(
        "--split",
        default="90,5,5",
        metavar="TRAIN,VALID,TEST",
        help="percentages of the documents; 0 writes no files for a split (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=1234,
        help="changes which documents fall into which split (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=default_workers(),
        metavar="N",
        help="processes that encode; the files do not depend on it (default: %(default)s)",
    )
    parser.add_argument(
        "--json-key",
        default="text",
        metavar="KEY",
        help="where JSONL objects hold their text (default: %(default)s)",
    )
    parser.add_argument(
        "--extensions",
        default=",".join(DIRECTORY_EXTENSIONS),
        metavar=".EXT,...",
        help="which files of directories are read (default: %(default)s)",
    )
    parser.add_argument(
        "--skip-bad-input",
        action="store_true",
        help="leave out documents that cannot be read and list them, instead of stopping",
    )
    return parser


def parse_options(arguments: Sequence[str] | None) -> PrepareOptions:
    """The options of a command line.

    Raises:
        PreparationError: a value is out of range.
    """
    args = build_parser().parse_args(arguments)
    extensions = [part.strip() for part in args.extensions.split(",") if part.strip()]
    return PrepareOptions(
        output_prefix=args.output_prefix,
        model=args.model,
        inputs=tuple(args.input),
        tokenizer_model=args.tokenizer_model,
        vocab_size=args.vocab_size,
        workers=args.workers,
        split=parse_split(args.split),
        seed=args.seed,
        json_key=args.json_key,
        extensions=tuple("." + extension.removeprefix(".") for extension in extensions),
        skip_bad_input=args.skip_bad_input,
    )


def format_summary(prepared: Prepared[Manifest]) -> str:
    """What was prepared, as a table, with Megatron's options for it."""
    outputs, manifest = prepared.outputs, prepared.manifest
    lines = [f"{'split':<8}{'documents':>12}{'bytes':>16}{'tokens':>16}{'bytes/token':>13}"]
    lines += [
        f"{name:<8}{split.documents:>12,}{split.bytes:>16,}{split.tokens:>16,}"
        f"{split.bytes / split.tokens:>13.2f}"
        for name, split in manifest.splits.items()
    ]
    lines += _format_remarks(manifest)
    end = manifest.end_of_document
    lines += [
        f"tokenizer: {manifest.vocab_size:,} pieces, "
        f"end of document {'in the index alone' if end is None else end}, "
        f"ids stored as {manifest.token_dtype}",
        "options for Megatron:",
        f"  --tokenizer-type SentencePieceTokenizer --tokenizer-model {outputs.tokenizer}",
        "  "
        + " ".join(f"--{name}-data-path {outputs.data_path(name)}" for name in manifest.splits),
        f"  --data-cache-path {outputs.cache}",
    ]
    return "\n".join(lines)


def _format_remarks(manifest: Manifest) -> list[str]:
    counted = {
        "empty documents left out": manifest.empty_documents,
        "bad documents left out": len(manifest.bad_documents),
        "files of directories left out for their extension": manifest.ignored_files,
        "tokens unknown to the tokenizer": sum(
            split.unknown_tokens for split in manifest.splits.values()
        ),
    }
    return [f"{what}: {count:,}" for what, count in counted.items() if count]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the process's exit status."""

    def run() -> None:
        prepared = prepare(parse_options(arguments))
        if prepared.reused:
            print(f"already prepared, nothing to do: {prepared.outputs.manifest}")
        print(format_summary(prepared))

    return run_command("prepare", run)


if __name__ == "__main__":
    sys.exit(main())
