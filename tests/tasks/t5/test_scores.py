from math import isnan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe_comp.tasks.t5.scores import Scores, exact_match, token_f1

TEXTS = st.text(alphabet="ab _\n\t")

F1 = {
    ("get_value", "get_value"): 1.0,
    ("get_value", "get_item"): 0.5,
    ("get value", "get_value"): 1.0,
    ("Get", "get"): 0.0,
    ("the value", "value"): 2 / 3,  # an article counts
    ("a a b", "a b b"): 2 / 3,  # min(2, 1) + min(1, 2) of 3 and 3 words
    ("a", "a b c"): 0.5,  # precision 1, recall 1/3
    ("", ""): 1.0,
    (" _", ""): 1.0,
    ("", "a"): 0.0,
}


@pytest.mark.parametrize(("pair", "expected"), F1.items(), ids=map(repr, F1))
def test_f1_by_hand(pair, expected):
    assert token_f1(*pair) == pytest.approx(expected)


def test_exact_match_ignores_the_amount_of_white_space_alone():
    assert exact_match(" return\n  x ", "return x")
    assert not exact_match("returnx", "return x")
    assert not exact_match("get value", "get_value")
    assert not exact_match("X", "x")


@given(TEXTS, TEXTS)
def test_bounds_symmetry_and_identity(a, b):
    f1 = token_f1(a, b)
    assert 0 <= f1 <= 1
    assert f1 == token_f1(b, a)
    assert token_f1(a, a) == 1
    assert exact_match(a, b) == exact_match(b, a)
    if exact_match(a, b):
        assert f1 == 1


@given(TEXTS, TEXTS)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(a, b):
    left, right = (text.replace("_", " ").split() for text in (a, b))
    common = sum(min(left.count(word), right.count(word)) for word in set(left))
    if common:
        precision, recall = common / len(left), common / len(right)
        assert token_f1(a, b) == pytest.approx(2 * precision * recall / (precision + recall))
    elif left or right:
        assert token_f1(a, b) == 0


@given(st.lists(st.tuples(TEXTS, TEXTS)), st.lists(st.tuples(TEXTS, TEXTS)))
def test_sums_of_ranks_are_those_of_all_answers(mine, theirs):
    ranks, whole = (Scores(), Scores()), Scores()
    for scores, answers in zip(ranks, (mine, theirs), strict=True):
        for answer in answers:
            scores.add(*answer)
            whole.add(*answer)
    totals = [a + b for a, b in zip(*(scores.sums() for scores in ranks), strict=True)]
    assert Scores.from_sums(totals).sums() == pytest.approx(whole.sums())


def test_means():
    scores = Scores()
    assert isnan(scores.mean_exact)
    assert isnan(scores.mean_f1)
    for prediction in ("get_value", "get_item", "x", "get value"):
        scores.add(prediction, "get_value")
    assert scores.mean_exact == 1 / 4
    assert scores.mean_f1 == (1 + 0.5 + 0 + 1) / 4
