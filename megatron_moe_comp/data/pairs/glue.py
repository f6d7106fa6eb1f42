"""Turns the tasks of GLUE into pairs of texts as T5 was trained on, from local files.

    python -m megatron_moe_comp.data.pairs.glue --task sst2 --input SST-2/ --output-prefix data/sst2

The files are those that GLUE distributes (train.tsv, dev.tsv, test.tsv) or JSONL with the names of
Hugging Face's export.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_moe_comp.data.errors import PreparationError, run_command
from megatron_moe_comp.data.options import check_prefix
from megatron_moe_comp.data.outputs import Outputs
from megatron_moe_comp.data.pairs.glue_tasks import TASKS, Unlabelled, convert_row
from megatron_moe_comp.data.pairs.reader import FoundLines, decode_line, parse_object, write_pairs

# The first that is there is read.
STEMS = {
    "train": ("train", "msr_paraphrase_train"),
    "valid": ("dev", "validation", "valid", "dev_matched", "validation_matched"),
    "valid_mismatched": ("dev_mismatched", "validation_mismatched"),
    "test": ("test", "test_matched", "msr_paraphrase_test"),
    "test_mismatched": ("test_mismatched",),
}
EXTENSIONS = (".tsv", ".txt", ".jsonl", ".json")


@dataclass
class Converted:
    """The pairs of one file, and what was found besides."""

    path: Path
    pairs: list[tuple[str, str]]
    bad: FoundLines
    num_rows: int = 0
    unlabelled: int = 0


def find_files(folder: Path) -> dict[str, Path]:
    """The file of each split that ``folder`` has.

    Raises:
        PreparationError: there is none to train on.
    """
    found: dict[str, Path] = {}
    for split, stems in STEMS.items():
        paths = (folder / (stem + extension) for stem in stems for extension in EXTENSIONS)
        if path := next(filter(Path.is_file, paths), None):
            found[split] = path
    if "train" not in found:
        raise PreparationError(
            f"--input {folder}: has no train.tsv or train.jsonl: give the directory of one task"
        )
    return found


def convert_file(name: str, split: str, path: Path) -> Converted:
    """The pairs of the task ``name`` in a TSV or JSONL file."""
    converted = Converted(path, [], FoundLines())
    rows = _read_tsv(name, path) if path.suffix in (".tsv", ".txt") else _read_jsonl(path)
    for number, row in rows:
        converted.num_rows += 1
        try:
            if isinstance(row, PreparationError):
                raise row
            converted.pairs.append(convert_row(name, row))
        except Unlabelled:
            if split.startswith("test"):
                converted.unlabelled += 1
            else:
                converted.bad.add(number, "no label")
        except PreparationError as error:
            converted.bad.add(number, str(error))
    return converted


_Rows = Iterator[tuple[int, dict[str, object] | PreparationError]]


def _read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as stream:
        yield from ((number, line) for number, line in enumerate(stream, start=1) if line.strip())


def _read_tsv(name: str, path: Path) -> _Rows:
    header: Sequence[str] = ()
    for number, line in _read_lines(path):
        try:
            text = decode_line(line)
        except PreparationError as error:
            yield number, error
            continue
        # GLUE quotes nothing: a quotation mark is one of the text.
        cells = text.rstrip("\r\n").split("\t")
        if not header:
            known = {column for columns in TASKS[name].fields.values() for column in columns}
            if known.intersection(cells) or not TASKS[name].columns:
                header = cells
                continue
            header = TASKS[name].columns
        if len(cells) == len(header):
            yield number, dict(zip(header, cells, strict=True))
        else:
            yield number, PreparationError(f"{len(cells)} columns, not {len(header)}")


def _read_jsonl(path: Path) -> _Rows:
    for number, line in _read_lines(path):
        try:
            yield number, parse_object(decode_line(line))
        except PreparationError as error:
            yield number, error


def convert_task(name: str, folder: Path, prefix: Path, skip_bad_rows: bool) -> list[str]:
    """Write PREFIX_SPLIT.jsonl for each split of a task; a summary, line by line.

    Raises:
        PreparationError: files are missing, have bad rows, or no labelled row.
    """
    converted = {
        split: convert_file(name, split, path) for split, path in find_files(folder).items()
    }
    for split, found in converted.items():
        if found.bad.count and not skip_bad_rows:
            raise PreparationError(
                f"{found.path}: {found.bad.count} of {found.num_rows} rows are bad: "
                f"{found.bad.reasons()}: correct them, or pass --skip-bad-rows to leave them out"
            )
        if not found.pairs and not split.startswith("test"):
            raise PreparationError(
                f"{found.path}: has no usable row ({found.bad.reasons() or 'it is empty'}): give "
                f"the file of the task {name}"
            )
    _write(converted, Outputs(prefix))
    return _format_summary(converted, Outputs(prefix))


def _write(converted: dict[str, Converted], outputs: Outputs) -> None:
    outputs.prefix.parent.mkdir(parents=True, exist_ok=True)
    for split in STEMS:
        path = outputs.pairs(split)
        if split not in converted or not converted[split].pairs:
            # Perhaps of an earlier run.
            path.unlink(missing_ok=True)
            continue
        partial = path.with_name(path.name + ".partial")
        write_pairs(partial, converted[split].pairs)
        os.replace(partial, path)


def _format_summary(converted: dict[str, Converted], outputs: Outputs) -> list[str]:
    lines = []
    for split, found in converted.items():
        lines.append(f"{split}: {len(found.pairs):,} pairs from {found.path}")
        if found.pairs:
            (target, count), *_ = Counter(target for _, target in found.pairs).most_common(1)
            lines[-1] += f", {count / len(found.pairs):.1%} of them {target!r}"
        if found.unlabelled:
            lines.append(f"  left out: {found.unlabelled:,} rows without a label")
        if found.bad.count:
            lines.append(f"  left out: {found.bad.count:,} bad rows: {found.bad.reasons()}")
    written = [split for split, found in converted.items() if found.pairs]
    options = [
        f"--{split}-data-path {outputs.pairs(split)}" for split in written if "_" not in split
    ]
    others = [str(outputs.pairs(split)) for split in written if "_" in split]
    lines += ["options for training:", "  " + " ".join(options)]
    return [*lines, *(f"also written: {path}" for path in others)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the process's exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_moe_comp.data.pairs.glue",
        description="Turn a task of GLUE into pairs of texts, as T5 was trained on.",
        epilog="Writes PREFIX_{train,valid,test}.jsonl and for mnli PREFIX_valid_mismatched.jsonl.",
    )
    parser.add_argument("--task", required=True, choices=list(TASKS))
    parser.add_argument(
        "--input",
        required=True,
        type=Path,
        metavar="DIR",
        help="directory with the task's train.tsv, dev.tsv and test.tsv, or with train.jsonl, "
        "validation.jsonl and test.jsonl",
    )
    parser.add_argument(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="beginning of every output path",
    )
    parser.add_argument(
        "--skip-bad-rows",
        action="store_true",
        help="leave out rows that cannot be used and list them, instead of stopping",
    )
    args = parser.parse_args(arguments)

    def run() -> None:
        check_prefix(args.output_prefix)
        prefix = Path(args.output_prefix)
        lines = convert_task(args.task, args.input, prefix, args.skip_bad_rows)
        print("\n".join(lines))

    return run_command("glue", run)


if __name__ == "__main__":
    sys.exit(main())
