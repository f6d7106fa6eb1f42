"""Python source to pairs: :func:`prepare_pairs` takes options and leaves the files of a prefix."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_moe_comp.data import corpora, splits
from megatron_moe_comp.data.corpora import BadDocument, Corpus
from megatron_moe_comp.data.errors import PreparationError
from megatron_moe_comp.data.options import check_prefix
from megatron_moe_comp.data.outputs import AnyManifest, Outputs
from megatron_moe_comp.data.pairs.function_tasks import TASKS, Function, cut_at_line, find_functions
from megatron_moe_comp.data.pairs.reader import write_pairs
from megatron_moe_comp.data.rebuild import Prepared, fingerprint_sources, log_to_stderr, make
from megatron_moe_comp.data.tokenizer import T5, load_tokenizer, sample_windows, train_tokenizer

# Raised when the same options and inputs would give other files than before.
_FORMAT = 1

_FREQUENT = 5


@dataclass(frozen=True)
class PairsOptions:
    """What to make pairs of; the fields are the command line's options.

    Without ``inputs`` it is the standard library.

    Raises:
        PreparationError: a value is out of range.
    """

    output_prefix: str
    inputs: tuple[str, ...] = ()
    task: str = "builtins"
    vocab_size: int = 2048
    max_input_tokens: int = 96
    split: tuple[float, ...] = (80.0, 10.0, 10.0)
    seed: int = 1234

    def __post_init__(self) -> None:
        check_prefix(self.output_prefix)
        if self.task not in TASKS:
            raise PreparationError(f"--task {self.task}: must be one of {', '.join(TASKS)}")
        if self.max_input_tokens < 8:
            raise PreparationError(
                f"--max-input-tokens {self.max_input_tokens}: must be 8 or more for a line to fit"
            )
        splits.check_split(self.split)
        if self.split[0] == 0:
            raise PreparationError(
                f"--split {splits.format_split(self.split)}: the tokenizer is trained on the "
                "training files: give them a share"
            )


@dataclass(frozen=True)
class PairStatistics:
    """What one split holds; token counts include the end of each sequence.

    ``frequent_targets`` are the most frequent ones with their counts.
    """

    files: int
    pairs: int
    input_tokens: int
    target_tokens: int
    longest_target: int
    frequent_targets: list[list[Any]]


@dataclass(frozen=True, kw_only=True)
class PairsManifest(AnyManifest):
    """What the pairs of a prefix were made from, and what they hold."""

    split_class = PairStatistics

    splits: dict[str, PairStatistics]
    functions: int
    special_functions: int
    repeated: int
    too_long: int
    without_target: int
    not_python: list[str]


def prepare_pairs(
    options: PairsOptions, log: Callable[[str], None] = log_to_stderr
) -> Prepared[PairsManifest]:
    """The pair files and tokenizer of ``options.output_prefix``, made unless they are there.

    Raises:
        PreparationError: the options or inputs cannot be prepared.
        OSError: the files cannot be written, for instance on a full disk.
    """
    corpus = (
        corpora.find_corpus(options.inputs, (".py",))
        if options.inputs
        else corpora.standard_library()
    )
    outputs = Outputs(Path(options.output_prefix))
    fingerprint = {
        "pairs_format": _FORMAT,
        "inputs": fingerprint_sources(corpus),
        "task": options.task,
        "vocab_size": options.vocab_size,
        "max_input_tokens": options.max_input_tokens,
        "split": list(options.split),
        "seed": options.seed,
    }
    build = partial(_build, options=options, corpus=corpus, log=log)
    return make(outputs, PairsManifest, corpus, fingerprint, build, log)


@dataclass(frozen=True)
class _Functions:
    """The functions of each split's files, and what was found besides."""

    by_split: dict[str, list[Function]]
    files: Counter[str]
    not_python: list[str]


def _read_functions(corpus: Corpus, options: PairsOptions) -> _Functions:
    """Divide the files, not the functions: those of one file resemble each other."""

    def refuse(bad: BadDocument) -> None:
        raise PreparationError(str(bad))

    documents: list[tuple[str, list[Function]]] = []
    not_python: list[str] = []
    for document in corpora.read_documents(corpus.sources, "text", refuse):
        try:
            functions = find_functions(document.text)
        except (SyntaxError, ValueError, RecursionError):
            not_python.append(document.name)
            continue
        if functions:
            documents.append((document.name, functions))
    hashes = [splits.hash_name(name, options.seed) for name, _ in documents]
    assigned = splits.assign_splits(hashes, options.split)
    by_split: dict[str, list[Function]] = {name: [] for name in splits.SPLIT_NAMES}
    files: Counter[str] = Counter()
    for (_, functions), split in zip(documents, assigned, strict=True):
        name = splits.SPLIT_NAMES[split]
        by_split[name] += functions
        files[name] += 1
    return _Functions(by_split, files, not_python)


def _build(
    built: Outputs,
    options: PairsOptions,
    corpus: Corpus,
    fingerprint: dict[str, Any],
    log: Callable[[str], None],
) -> PairsManifest:
    """Write the tokenizer and the pairs to ``built``; the manifest of what they hold."""
    log(f"reading {len(corpus.sources):,} files")
    functions = _read_functions(corpus, options)
    sources = [function.source for function in functions.by_split["train"]]
    log(f"training a tokenizer of {options.vocab_size:,} pieces")
    windows = sample_windows(sources, sum(map(len, sources)))
    model = train_tokenizer(windows, options.vocab_size, T5)
    built.tokenizer.write_bytes(model)
    processor = load_tokenizer(model)
    log("writing pairs")
    statistics: dict[str, PairStatistics] = {}
    seen: set[str] = set()
    left_out: Counter[str] = Counter()
    for split, files in ((name, functions.files[name]) for name in splits.SPLIT_NAMES):
        if not files:
            continue
        pairs = _make_pairs(functions.by_split[split], options, processor, seen, left_out)
        if not pairs:
            raise PreparationError(
                f"--split {splits.format_split(options.split)}: the {files} file(s) of {split} "
                "hold no function to ask about: give more files, or the split a share of 0"
            )
        write_pairs(built.pairs(split), pairs)
        statistics[split] = _count(files, pairs, processor)
    everything = [function for part in functions.by_split.values() for function in part]
    return PairsManifest(
        fingerprint=fingerprint,
        splits=statistics,
        functions=len(everything),
        special_functions=sum(function.is_special for function in everything),
        repeated=left_out["repeated"],
        too_long=left_out["too_long"],
        without_target=left_out["without_target"],
        not_python=functions.not_python,
    )


def _make_pairs(
    functions: Sequence[Function],
    options: PairsOptions,
    processor: sentencepiece.SentencePieceProcessor,
    seen: set[str],
    left_out: Counter[str],
) -> list[tuple[str, str]]:
    """The pairs of functions whose inputs are not among those ``seen``, which it adds to."""
    task = TASKS[options.task]
    pairs = []
    for function in functions:
        whole = task.whole_input(function)
        text = cut_at_line(whole, options.max_input_tokens - 1, processor)
        if text is None:
            left_out["too_long"] += 1
            continue
        if text in seen:
            # Also with another target: it would be no task to tell the two apart.
            left_out["repeated"] += 1
            continue
        seen.add(text)
        if target := task.target(function, text.count("\n") + 1):
            pairs.append((text, target))
        else:
            left_out["without_target"] += 1
    return pairs


def _count(
    files: int,
    pairs: Sequence[tuple[str, str]],
    processor: sentencepiece.SentencePieceProcessor,
) -> PairStatistics:
    input_lengths, target_lengths = (
        [len(ids) + 1 for ids in processor.encode(list(texts))]
        for texts in zip(*pairs, strict=True)
    )
    return PairStatistics(
        files=files,
        pairs=len(pairs),
        input_tokens=sum(input_lengths),
        target_tokens=sum(target_lengths),
        longest_target=max(target_lengths),
        frequent_targets=[
            list(item) for item in Counter(target for _, target in pairs).most_common(_FREQUENT)
        ],
    )
