"""Makes pairs for sequence-to-sequence training from Python source: questions about functions.

    python -m megatron_moe_comp.data.prepare_pairs --output-prefix data/stdlib_pairs

A second run with the same options and unchanged input returns at once; a run that was killed is
run again.
"""

import argparse
import sys
from collections.abc import Sequence

from megatron_moe_comp.data import splits
from megatron_moe_comp.data.errors import run_command
from megatron_moe_comp.data.pairs.function_tasks import TASKS
from megatron_moe_comp.data.pairs.pipeline import PairsManifest, PairsOptions, prepare_pairs
from megatron_moe_comp.data.rebuild import Prepared


def build_parser() -> argparse.ArgumentParser:
    """The command line; :class:`PairsOptions` says what each option means and allows."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_moe_comp.data.prepare_pairs",
        description="Make pairs for sequence-to-sequence training from Python source: the "
        "input is a function, the target what the task asks about it. Also trains a tokenizer.",
        epilog="Writes PREFIX_tokenizer.model and PREFIX_{train,valid,test}.jsonl, and last "
        "PREFIX_manifest.json.",
    )
    defaults = PairsOptions(output_prefix="-")
    parser.add_argument(
        "--output-prefix", required=True, metavar="PREFIX", help="beginning of every output path"
    )
    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help="Python files and directories of them; default: this Python's standard library",
    )
    parser.add_argument(
        "--task",
        choices=list(TASKS),
        default=defaults.task,
        help="the target: the names of Python's builtins that the function uses, in order, or the "
        "name of the function, which is masked in the input (default: %(default)s)",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=defaults.vocab_size,
        metavar="N",
        help="number of pieces of the tokenizer, 100 sentinels included (default: %(default)s)",
    )
    parser.add_argument(
        "--max-input-tokens",
        type=int,
        default=defaults.max_input_tokens,
        metavar="N",
        help="functions are cut, at a line's end, to this with the end of the sequence "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--split",
        default=splits.format_split(defaults.split),
        metavar="TRAIN,VALID,TEST",
        help="percentages of the files; 0 writes nothing for a split (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=defaults.seed,
        help="changes which files fall into which split (default: %(default)s)",
    )
    return parser


def parse_options(arguments: Sequence[str] | None) -> PairsOptions:
    """The options of a command line.

    Raises:
        PreparationError: a value is out of range.
    """
    args = build_parser().parse_args(arguments)
    fields = vars(args) | {"inputs": tuple(args.input), "split": splits.parse_split(args.split)}
    del fields["input"]
    return PairsOptions(**fields)


def format_summary(prepared: Prepared[PairsManifest]) -> str:
    """What was made, as a table, with the options for training on it."""
    outputs, manifest = prepared.outputs, prepared.manifest
    head = f"{'split':<8}{'files':>8}{'pairs':>10}{'input tokens':>14}{'target tokens':>15}"
    lines = [f"{head}  most frequent target"]
    for name, split in manifest.splits.items():
        target, count = split.frequent_targets[0]
        lines.append(
            f"{name:<8}{split.files:>8,}{split.pairs:>10,}{split.input_tokens / split.pairs:>14.1f}"
            f"{split.target_tokens / split.pairs:>15.1f}  {target} ({count / split.pairs:.1%})"
        )
    longest = max(split.longest_target for split in manifest.splits.values())
    # Sequence parallelism divides sequences.
    decoder_length = -(-longest // 8) * 8
    lines += [
        f"{manifest.functions:,} functions, {manifest.special_functions:,} of them special such as "
        f"__init__; left out: {manifest.repeated:,} that repeat another, {manifest.too_long:,} "
        f"without two lines that fit and {manifest.without_target:,} without a target",
    ]
    if manifest.not_python:
        lines.append(f"files left out as no Python: {', '.join(manifest.not_python)}")
    lines += [
        "options for training:",
        f"  --tokenizer-type SentencePieceTokenizer --tokenizer-model {outputs.tokenizer}",
        "  " + " ".join(f"--{name}-data-path {outputs.pairs(name)}" for name in manifest.splits),
        f"  --encoder-seq-length {manifest.fingerprint['max_input_tokens']} "
        f"--decoder-seq-length {decoder_length}",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the process's exit status."""

    def run() -> None:
        prepared = prepare_pairs(parse_options(arguments))
        if prepared.reused:
            print(f"already prepared, nothing to do: {prepared.outputs.manifest}")
        print(format_summary(prepared))

    return run_command("prepare_pairs", run)


if __name__ == "__main__":
    sys.exit(main())
