"""What rows of benchmarks/network.py say: by case, the limit at each rate, where a method pays."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_moe_comp.report.inputs import Entry

UNSHAPED, STOCK = "none", "none"
SMALLEST_LIMIT = 1.1
PHASES = ("encode", "transfer", "decode", "experts", "rest")
UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


def rate_bits(rate: str) -> float:
    """Returns a rate of tc in bits per second; infinity for "none".

    Raises:
        ValueError: it is no such rate.
    """
    if rate == UNSHAPED:
        return math.inf
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)bit", rate.lower())
    if match is None or not float(match[1]):
        raise ValueError(
            f"{rate}: not a rate. Use a number and bit, kbit, mbit or gbit, as in 200mbit, or none."
        )
    return float(match[1]) * UNITS[match[2]]


def bits_label(bits: float) -> str:
    """Returns bits per second as text, such as "200 Mbit/s"."""
    if math.isinf(bits):
        return "unshaped"
    prefix = max((u for u in UNITS if bits >= UNITS[u]), key=UNITS.__getitem__, default="")
    return f"{bits / UNITS[prefix]:.3g} {prefix.upper().replace('K', 'k')}bit/s"


@dataclass(frozen=True)
class Case:
    """The rows of one number of ranks and one routing."""

    ranks: int
    routing: str
    rows: tuple[Entry, ...]

    @property
    def name(self) -> str:
        """How it is named in titles."""
        return f"{self.ranks} ranks, {self.routing} routing"

    @cached_property
    def by_rate_and_method(self) -> dict[tuple[str, str], Entry]:
        """Its rows."""
        return {(row["rate"], row["method"]): row for row in self.rows}

    @property
    def rates(self) -> list[str]:
        """Its rates, slowest first."""
        return sorted({row["rate"] for row in self.rows}, key=rate_bits)

    @property
    def methods(self) -> list[str]:
        """Its methods but stock Megatron, in the order of the file."""
        return [m for m in dict.fromkeys(row["method"] for row in self.rows) if m != STOCK]

    def limit(self, rate: str, method: str = STOCK) -> float | None:
        """Returns the method's speed-up if communication cost nothing: T_method / T_free."""
        slow = self.by_rate_and_method.get((rate, method))
        free = self.by_rate_and_method.get((UNSHAPED, STOCK))
        return slow["step_ms"] / free["step_ms"] if slow and free else None

    def share_of_gain(self, row: Entry) -> float | None:
        """Returns the share of the possible gain; None where there is next to nothing to gain."""
        limit = self.limit(row["rate"])
        worth = row["method"] != STOCK and limit is not None and limit >= SMALLEST_LIMIT
        return row.get("share_of_gain") if worth else None

    def compared(self, method: str) -> list[Entry]:
        """Returns the rows that tell a method's speed-up over stock Megatron, slowest first."""
        found = [self.by_rate_and_method.get((rate, method), {}) for rate in self.rates]
        return [row for row in found if row.get("speedup")]


def cases(rows: Iterable[Entry]) -> list[Case]:
    """Returns the rows by number of ranks and routing."""
    groups: dict[tuple[int, str], list[Entry]] = {}
    for row in rows:
        groups.setdefault((row["ranks"], row["routing"]), []).append(row)
    return [Case(*key, tuple(group)) for key, group in sorted(groups.items())]


@dataclass(frozen=True)
class BreakEven:
    """Between which bandwidths a method is faster than stock Megatron, in words."""

    slowest: str
    fastest: str
    remark: str


def break_even(speedups: Sequence[tuple[str, float]]) -> BreakEven:
    """Returns where a method pays, from at least one (rate, speed-up), slowest first.

    Between two measured rates the logarithm of the speed-up is taken as linear in that of the rate.
    """
    paying = [index for index, (_, speedup) in enumerate(speedups) if speedup > 1]
    if not paying:
        return BreakEven("-", "-", "pays at no measured rate")
    first, last = paying[0], paying[-1]
    slowest, fastest = bits_label(rate_bits(speedups[first][0])), ""
    slowest = f"{slowest}, the slowest measured" if first == 0 else crossing(speedups, first - 1)
    if last == len(speedups) - 1:
        fastest = f"{bits_label(rate_bits(speedups[last][0]))}, the fastest measured"
    else:
        fastest = crossing(speedups, last)
    if len(paying) == len(speedups):
        return BreakEven(slowest, fastest, "pays at all measured rates")
    gaps = len(paying) < last - first + 1
    return BreakEven(slowest, fastest, "not at all rates between" if gaps else "")


def crossing(speedups: Sequence[tuple[str, float]], index: int) -> str:
    """Returns the rate between this point and the next at which the speed-up is 1."""
    (left, first), (right, second) = speedups[index : index + 2]
    if math.isinf(rate_bits(right)):
        return f"between {bits_label(rate_bits(left))} and unshaped"
    start, end = math.log(rate_bits(left)), math.log(rate_bits(right))
    share = math.log(first) / (math.log(first) - math.log(second))
    return f"about {bits_label(round_to(math.exp(start + share * (end - start)), 2))}"


def round_to(value: float, digits: int) -> float:
    """Returns a positive value rounded to this many significant digits."""
    return float(f"{value:.{digits - 1}e}")
