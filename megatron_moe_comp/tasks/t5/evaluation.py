"""Evaluation by answering: greedy decoding of a file's lines, exact match and token F1."""

import json
from collections.abc import Callable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.datasets.utils import Split
from megatron.core.transformer.module import MegatronModule
from megatron.training import print_rank_last
from megatron.training.utils import is_rank0
from tqdm import tqdm

from megatron_moe_comp.comm.all_to_all import gather_over_ranks, sum_over_ranks
from megatron_moe_comp.data.pairs.reader import Pairs
from megatron_moe_comp.data.t5_tokenizer import T5Tokenizer
from megatron_moe_comp.tasks.t5.batches import rounded_length
from megatron_moe_comp.tasks.t5.greedy_decoding import greedy_decode
from megatron_moe_comp.tasks.t5.scores import Scores
from megatron_moe_comp.training.log_outputs import require_writable, write_scalars

NAMES = {Split.train: "training", Split.valid: "validation", Split.test: "test"}


class Answer(NamedTuple):
    """A line of --predictions-jsonl."""

    input: str
    target: str
    prediction: str


class AnswerEvaluation:
    """Answers lines of the file whose loss has just been evaluated (a `non_loss_data_func`).

    Args:
        tokenizer: of the model.
        pairs: of each split.
        num_samples: most lines of a file that are answered, evenly spread over it.
        batch_size: lines that a rank answers at a time.
        max_input_tokens: most tokens of an input.
        max_tokens: most tokens of an answer.
        predictions: where to write all answers, in the order of the lines, or None.
        iteration: returns how many iterations the model has been trained for.

    Raises:
        ValueError: rank 0 cannot write the file.
    """

    def __init__(
        self,
        tokenizer: T5Tokenizer,
        pairs: Mapping[Split, Pairs],
        *,
        num_samples: int,
        batch_size: int,
        max_input_tokens: int,
        max_tokens: int,
        predictions: str | None,
        iteration: Callable[[], int],
    ) -> None:
        self._tokenizer = tokenizer
        self._pairs = pairs
        self._num_samples = num_samples
        self._batch_size = batch_size
        self._max_input_tokens = max_input_tokens
        self._max_tokens = max_tokens
        self._predictions = Path(predictions) if predictions else None
        self._iteration = iteration
        self.split = Split.valid
        """What is being evaluated."""
        if self._predictions is not None and is_rank0():
            require_writable("--predictions-jsonl", str(self._predictions))

    def __call__(self, models: list[MegatronModule]) -> None:
        """Prints and logs the scores of the current split; every rank must call it."""
        answers = self._answer(models[0])
        scores = Scores()
        for answer in answers:
            scores.add(answer.prediction, answer.target)
        scores = Scores.from_sums(
            sum_over_ranks(torch.tensor(scores.sums(), dtype=torch.float64)).tolist()
        )
        name = NAMES[self.split]
        print_rank_last(
            f" answers to {scores.count:.0f} of {len(self._pairs[self.split])} lines of the {name} "
            f"set | exact match: {scores.mean_exact:.4f} | token F1: {scores.mean_f1:.4f} |"
        )
        scalars = {f"exact match {name}": scores.mean_exact, f"token F1 {name}": scores.mean_f1}
        write_scalars(scalars, self._iteration())
        if self._predictions is not None:
            # The ranks took turns in choosing their lines.
            turns = zip_longest(*gather_over_ranks(answers))
            if is_rank0():
                everyone = [answer for turn in turns for answer in turn if answer is not None]
                lines = [json.dumps(a._asdict(), ensure_ascii=False) + "\n" for a in everyone]
                self._predictions.write_text("".join(lines), encoding="utf-8")

    def _answer(self, model: MegatronModule) -> list[Answer]:
        """Returns this rank's answers; none where another tensor parallel rank has the same."""
        pairs, size = self._pairs[self.split], self._batch_size
        ranks, rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
        wanted = np.linspace(0, len(pairs), min(self._num_samples, len(pairs)), endpoint=False)
        mine = wanted.astype(int)[rank::ranks]
        # All ranks take as many steps as the one with the most lines: experts serve all ranks.
        num_batches = -(-len(wanted) // (ranks * size))
        answers = []
        for start in tqdm(
            range(0, num_batches * size, size),
            desc="answering",
            leave=False,
            disable=None if is_rank0() else True,
        ):
            lines = mine[start : start + size]
            predictions = self._predict(model, [pairs[i][0] for i in lines])
            answers += [
                Answer(self._tokenizer.decode(pairs[i][0]), pairs.target_text(i), prediction)
                for i, prediction in zip(lines, predictions, strict=True)
            ]
        return answers if mpu.get_tensor_model_parallel_rank() == 0 else []

    def _predict(self, model: MegatronModule, inputs: list[np.ndarray]) -> list[str]:
        """Returns an answer to each input; without any, the model runs on padding all the same."""
        parallel = mpu.get_tensor_model_parallel_world_size()
        longest = max(map(len, inputs), default=1)
        width = rounded_length(longest, parallel, limit=self._max_input_tokens)
        tokens = torch.full((max(len(inputs), 1), width), self._tokenizer.pad_id)
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        mask[:, 0] = True
        for row, ids in enumerate(inputs):
            tokens[row, : len(ids)] = torch.from_numpy(ids)
            mask[row, : len(ids)] = True
        device = next(model.parameters()).device
        decoded = greedy_decode(
            model, tokens.to(device), mask.to(device), self._tokenizer, self._max_tokens, parallel
        )
        return [self._tokenizer.decode(row) for row in decoded[: len(inputs)].tolist()]
