"""Where a method pays, and what could be gained."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe_comp.report.network_results import bits_label, break_even, cases, rate_bits
from tests.report.samples import network_rows


def test_rates_of_tc():
    rates = {"200mbit": 2e8, "1gbit": 1e9, "2.5Gbit": 2.5e9, "64kbit": 64e3, "9bit": 9}
    assert {rate: rate_bits(rate) for rate in rates} == rates
    assert [bits_label(bits) for bits in rates.values()] == [
        "200 Mbit/s",
        "1 Gbit/s",
        "2.5 Gbit/s",
        "64 kbit/s",
        "9 bit/s",
    ]
    assert bits_label(rate_bits("none")) == "unshaped"
    for wrong in ("fast", "1mbps", "gbit", ""):
        with pytest.raises(ValueError, match="gbit"):
            rate_bits(wrong)


@given(st.floats(110, 9000), st.floats(0.1, 2), st.booleans())
def test_the_crossing_of_a_line_is_found(crossing, slope, rising):
    """In a plot of two logarithms, the speed-up is a line through 1 at the crossing."""
    power = slope if rising else -slope
    points = [(f"{r}mbit", (r / crossing) ** power) for r in (100, 1000, 10_000)]
    found = break_even(points)
    text = found.slowest if rising else found.fastest
    number, unit = re.fullmatch(r"about ([\d.]+) ([MG])bit/s", text).groups()
    megabits = float(number) * {"M": 1, "G": 1000}[unit]
    # Two significant digits.
    assert math.isclose(megabits, crossing, rel_tol=0.051)
    assert "measured" in (found.fastest if rising else found.slowest)


def test_words_for_every_sign():
    rates = ("200mbit", "1gbit", "10gbit", "none")

    def words(*speedups):
        return vars(break_even(list(zip(rates, speedups, strict=True))))

    slowest, fastest = "200 Mbit/s, the slowest measured", "unshaped, the fastest measured"
    always = {"slowest": slowest, "fastest": fastest, "remark": "pays at all measured rates"}
    assert words(2, 1.5, 1.2, 1.1) == always
    assert words(0.9, 0.9, 1, 0.5)["remark"] == "pays at no measured rate"
    assert words(2, 1.5, 1.2, 0.9)["fastest"] == "between 10 Gbit/s and unshaped"
    assert words(2, 0.9, 1.2, 0.9)["remark"] == "not at all rates between"
    assert words(1.1, 1.1, 1.1, 0.9)["remark"] == ""


def test_the_limit_is_the_time_without_a_network():
    rows = network_rows(methods=("none", "birdmoe"), ranks=(4, 2), routings=("real", "balanced"))
    found = cases(rows)
    names = [(case.ranks, case.routing) for case in found]
    assert names == [(2, "balanced"), (2, "real"), (4, "balanced"), (4, "real")]
    assert found[0].rates == ["200mbit", "1gbit", "10gbit", "none"]
    times = {row["rate"]: row["step_ms"] for row in found[0].rows if row["method"] == "none"}
    assert found[0].limit("1gbit") == pytest.approx(times["1gbit"] / times["none"])
    shaped = [row for row in rows if row["rate"] != "none"]
    assert all(case.limit("1gbit") is None for case in cases(shaped))


def test_a_share_of_next_to_nothing_is_not_told():
    (case,) = cases(network_rows(ranks=(2,), rates=("200mbit", "10gbit", "none")))
    slow, fast = (case.by_rate_and_method[rate, "birdmoe"] for rate in ("200mbit", "10gbit"))
    assert case.share_of_gain(slow) == slow["share_of_gain"]
    assert 1 < case.limit("10gbit") < 1.1
    assert fast["share_of_gain"] is not None
    assert case.share_of_gain(fast) is None
    assert case.share_of_gain(case.by_rate_and_method["200mbit", "none"]) is None
