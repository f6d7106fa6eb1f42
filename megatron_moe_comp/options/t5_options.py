"""T5Options: what finetune_t5_moe.py can be told beside Megatron's flags and the compression's.

A field is a command-line flag; its docstring is the flag's help text.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from megatron_moe_comp.options.checks import require_choice

Task = Literal["seq2seq", "span-corruption"]
Activation = Literal["relu", "geglu"]
BadLines = Literal["refuse", "skip"]
LongLines = Literal["refuse", "truncate"]


@dataclass(frozen=True, kw_only=True)
class T5Options:
    """The model's deviations from Megatron's T5, the task, and how it is evaluated.

    Raises:
        ValueError: a value is out of range.
    """

    task: Task = "seq2seq"
    """What to learn: targets from inputs, both read from JSONL files with one {"input": ...,
    "target": ...} object a line, or T5's pre-training objective on Megatron's token files."""

    t5_activation: Activation | None = None
    """Activation of the feed-forward: relu (T5) or geglu, the gated tanh GELU of T5 1.1 and
    Flan-T5; by default what Megatron's flags say."""

    t5_relative_positions: bool = False
    """T5's relative position biases, in place of --position-embedding-type; the same as its value
    relative, which Megatron refuses without Transformer Engine."""

    bad_lines: BadLines = "refuse"
    """Lines of a JSONL file that are no such object: refuse the file, or skip them; both with
    their numbers."""

    long_lines: LongLines = "refuse"
    """Lines with more tokens than --encoder-seq-length or --decoder-seq-length: refuse the file,
    or truncate them; both with their numbers."""

    decode_samples: int = 1000
    """How many lines of the validation or test file an evaluation answers by greedy decoding, for
    exact match and token F1; 0 for the loss alone."""

    predictions_jsonl: str | None = None
    """File for the input, target and prediction of every answered line; overwritten by each
    evaluation."""

    def __post_init__(self) -> None:
        for name, kind in (("task", Task), ("bad_lines", BadLines), ("long_lines", LongLines)):
            require_choice(name, getattr(self, name), get_args(kind))
        if self.t5_activation is not None:
            require_choice("t5_activation", self.t5_activation, get_args(Activation))
        if self.decode_samples < 0:
            raise ValueError(
                f"--decode-samples={self.decode_samples}: must be 0 or more; 0 evaluates the loss "
                "alone."
            )
        if self.task == "span-corruption" and self.predictions_jsonl is not None:
            raise ValueError(
                f"--predictions-jsonl={self.predictions_jsonl}: --task=span-corruption decodes no "
                "answers. Drop the option."
            )
