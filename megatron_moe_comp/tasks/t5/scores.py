"""How well generated answers equal their targets: exact match and F1 of their words."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from math import nan


def exact_match(prediction: str, target: str) -> bool:
    """Returns whether both are the same but for the amount of white space."""
    return prediction.split() == target.split()


def token_f1(prediction: str, target: str) -> float:
    """Returns the F1 of the bags of words, 0 to 1, of SQuAD (Rajpurkar et al. 2016).

    Words end at white space and underscores, so that `get_value` shares one of two words with
    `get_item` and scores 0.5. SQuAD's normalisation of English (case, articles, punctuation) is
    left out: it would change what code means. Two answers without words are equal.
    """
    predicted, expected = _words(prediction), _words(target)
    if not predicted and not expected:
        return 1.0
    common = (predicted & expected).total()
    return 2 * common / (predicted.total() + expected.total())


def _words(text: str) -> Counter[str]:
    return Counter(text.replace("_", " ").split())


@dataclass
class Scores:
    """Sums over answers, which can be summed over ranks."""

    count: float = 0.0
    exact: float = 0.0
    f1: float = 0.0

    def add(self, prediction: str, target: str) -> None:
        """Counts one more answer."""
        self.count += 1
        self.exact += exact_match(prediction, target)
        self.f1 += token_f1(prediction, target)

    def sums(self) -> tuple[float, ...]:
        """Returns what to add up over ranks (as float64); `from_sums` takes the totals."""
        return astuple(self)

    @classmethod
    def from_sums(cls, sums: Sequence[float]) -> "Scores":
        """Returns the Scores of these sums."""
        return cls(*sums)

    @property
    def mean_exact(self) -> float:
        """Share of answers that match exactly; NaN without answers."""
        return self.exact / self.count if self.count else nan

    @property
    def mean_f1(self) -> float:
        """Mean F1 over answers; NaN without answers."""
        return self.f1 / self.count if self.count else nan
