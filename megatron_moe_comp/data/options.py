"""What the user can choose, checked once."""

import os
from dataclasses import dataclass, field
from typing import Literal

from megatron_moe_comp.data import splits
from megatron_moe_comp.data.corpora import DIRECTORY_EXTENSIONS
from megatron_moe_comp.data.errors import PreparationError

_MAX_WORKERS = 8


def default_workers() -> int:
    """The processors this process may use, up to 8: starting more takes longer than it saves."""
    # Only Linux says which processors the process may use; a batch system gives it a part.
    affinity = getattr(os, "sched_getaffinity", None)
    usable = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(_MAX_WORKERS, usable)


def check_prefix(prefix: str) -> None:
    """Raise PreparationError if the output prefix names a directory instead of files in it."""
    if not prefix or prefix.endswith(os.sep):
        raise PreparationError(
            f"--output-prefix {prefix!r}: not a directory but the beginning of file names is "
            f"needed, such as {os.path.join(prefix, 'corpus')}"
        )


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare; the fields are the command line's options.

    Without ``inputs`` the corpus is the standard library. ``vocab_size`` is for training and
    ``tokenizer_model`` replaces training, so only one of them may be given.

    Raises:
        PreparationError: a value is out of range.
    """

    output_prefix: str
    inputs: tuple[str, ...] = ()
    model: Literal["gpt", "t5"] = "gpt"
    tokenizer_model: str | None = None
    vocab_size: int | None = None
    workers: int = field(default_factory=default_workers)
    split: tuple[float, ...] = (90.0, 5.0, 5.0)
    seed: int = 1234
    json_key: str = "text"
    extensions: tuple[str, ...] = DIRECTORY_EXTENSIONS
    skip_bad_input: bool = False

    def __post_init__(self) -> None:
        check_prefix(self.output_prefix)
        if self.workers < 1:
            raise PreparationError(
                f"--workers {self.workers}: must be 1 or more: 1 encodes without further processes"
            )
        if self.vocab_size is not None and self.tokenizer_model is not None:
            raise PreparationError(
                f"--vocab-size {self.vocab_size}: has no effect on the existing "
                f"--tokenizer-model {self.tokenizer_model}: leave one of the two out"
            )
        if self.vocab_size is not None and self.vocab_size < 1:
            raise PreparationError(f"--vocab-size {self.vocab_size}: must be 1 or more")
        splits.check_split(self.split)
        if self.split[0] == 0 and self.tokenizer_model is None:
            raise PreparationError(
                f"--split {splits.format_split(self.split)}: the tokenizer is trained on the "
                "training documents: give them a share, or pass --tokenizer-model"
            )
