"""AnswerEvaluation with a decoder that says what the tests want, on ranks of different numbers."""

import json
from unittest.mock import patch

import numpy as np
import pytest
import torch
from megatron.core.datasets.utils import Split

PAD, EOS = 0, 1
WRONG = 99
LONGEST = 20
"""Most tokens of an input."""


class Tokenizer:
    pad_id = PAD

    def decode(self, ids):
        return " ".join(str(int(id_)) for id_ in ids if id_ not in (PAD, EOS))


class NumberedLines:
    """Pairs whose line n has the input "n + 10 n + 11 ..." and the target "n + 10"."""

    def __init__(self, number):
        self._number = number

    def __len__(self):
        return self._number

    def __getitem__(self, index):
        length = 1 + 2 * index
        return np.array([*range(index + 10, index + 10 + length), EOS], dtype=np.int32), None

    def target_text(self, index):
        return str(index + 10)


def make_evaluation(**changes):
    from megatron_moe_comp.tasks.t5.evaluation import AnswerEvaluation

    options = {
        "tokenizer": Tokenizer(),
        "pairs": {Split.valid: NumberedLines(10), Split.test: NumberedLines(5)},
        "num_samples": 1000,
        "batch_size": 2,
        "max_input_tokens": LONGEST,
        "max_tokens": 3,
        "predictions": None,
        "iteration": lambda: 7,
    }
    return AnswerEvaluation(**options | changes)


def evaluate(rank, split, options):
    """Returns what an evaluation printed and logged, and the batches that it had answered.

    Every third line's answer is wrong.
    """
    from megatron_moe_comp.tasks.t5 import evaluation

    batches, printed, logged = [], [], []

    def greedy_decode(model, tokens, mask, tokenizer, max_tokens, tensor_parallel_size):
        assert max_tokens == 3
        # A mask that the model takes, and nothing but padding outside it.
        assert mask[:, 0].all()
        assert (tokens.masked_select(~mask) == PAD).all()
        assert tokens.shape[1] == (LONGEST if (mask.sum(dim=1) > 16).any() else 16)
        first = tokens[:, 0]
        batches.append([int(id_) - 10 for id_ in first if id_ != PAD])
        assert len(tokens) == max(len(batches[-1]), 1)
        said = torch.where((first - 10) % 3 == 2, WRONG, first)
        return torch.stack([said, torch.full_like(said, EOS)], dim=1)

    with patch.multiple(
        evaluation,
        greedy_decode=greedy_decode,
        print_rank_last=printed.append,
        write_scalars=lambda *scalars: logged.append(scalars),
    ):
        evaluation = make_evaluation(**options)
        if split is not None:
            evaluation.split = split
        evaluation([torch.nn.Linear(1, 1)])
    return printed, logged, batches


def test_lines_are_spread_evenly_and_scores_are_sums_over_ranks(pools):
    results = pools("ep2").run(evaluate, None, {"num_samples": 4})
    assert [batches for *_, batches in results] == [[[0, 5]], [[2, 7]]]
    for printed, logged, _ in results:
        # Lines 2 and 5 are answered wrongly, on different ranks.
        assert printed == [
            " answers to 4 of 10 lines of the validation set | exact match: 0.5000 | "
            "token F1: 0.5000 |"
        ]
        assert logged == [({"exact match validation": 0.5, "token F1 validation": 0.5}, 7)]


def test_ranks_with_fewer_lines_take_as_many_steps(pools, tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    results = pools("ep2").run(evaluate, Split.test, {"predictions": str(path)})
    assert [batches for *_, batches in results] == [[[0, 2], [4]], [[1, 3], []]]
    assert results[1][0] == [
        " answers to 5 of 5 lines of the test set | exact match: 0.8000 | token F1: 0.8000 |"
    ]
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    # In the order of the file, whatever the number of ranks.
    assert [answer["target"] for answer in answers] == ["10", "11", "12", "13", "14"]
    assert [answer["prediction"] for answer in answers] == ["10", "11", "99", "13", "14"]
    assert answers[2]["input"] == "12 13 14 15 16"


def test_the_next_evaluation_replaces_the_predictions(pools, tmp_path):
    path = tmp_path / "answers.jsonl"
    for number in (10, 3):
        pools("ep2").run(evaluate, None, {"num_samples": number, "predictions": str(path)})
        assert len(path.read_text().splitlines()) == number


def test_ranks_that_share_a_model_answer_once(pools, tmp_path):
    path = tmp_path / "answers.jsonl"
    results = pools("tp2").run(evaluate, Split.test, {"predictions": str(path)})
    assert [batches for *_, batches in results] == [[[0, 1], [2, 3], [4]]] * 2
    assert results[1][0] == [
        " answers to 5 of 5 lines of the test set | exact match: 0.8000 | token F1: 0.8000 |"
    ]
    assert len(path.read_text().splitlines()) == 5


@pytest.mark.parametrize("samples", [1, 7, 10, 11])
def test_no_line_is_answered_twice(pools, samples):
    results = pools("ep2").run(evaluate, None, {"num_samples": samples})
    lines = [line for *_, batches in results for batch in batches for line in batch]
    assert len(lines) == len(set(lines)) == min(samples, 10)
    assert len({len(batches) for *_, batches in results}) == 1


@pytest.mark.parametrize("name", ["file/answers.jsonl", "directory"])
def test_a_path_that_cannot_be_written_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr("megatron_moe_comp.tasks.t5.evaluation.is_rank0", lambda: True)
    (tmp_path / "file").write_text("")
    (tmp_path / "directory").mkdir()
    path = tmp_path / name
    with pytest.raises(ValueError, match="Name a file in a directory that you may") as caught:
        make_evaluation(predictions=str(path))
    assert str(caught.value).startswith(f"--predictions-jsonl={path}: rank 0 must be able to write")


def test_starting_keeps_earlier_predictions(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_moe_comp.tasks.t5.evaluation.is_rank0", lambda: True)
    path = tmp_path / "answers.jsonl"
    path.write_text("earlier\n")
    make_evaluation(predictions=str(path))
    assert path.read_text() == "earlier\n"
