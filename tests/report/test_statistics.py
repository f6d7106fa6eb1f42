"""Intervals against Student's density and against samples with a known mean."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe_comp.report.statistics import (
    T95,
    paired_ratio,
    running_mean,
    student_t95,
)


def mass_within(t, degrees, steps=2000):
    """Probability of [-t, t] under Student's density, by Simpson's rule."""
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    scale = math.exp(log_scale) / math.sqrt(degrees * math.pi)
    width = t / steps
    heights = [(1 + (i * width) ** 2 / degrees) ** (-(degrees + 1) / 2) for i in range(steps + 1)]
    simpson = heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])
    return 2 * scale * width / 3 * simpson


@pytest.mark.parametrize("degrees", range(1, len(T95) + 1))
def test_95_percent_lie_within_the_quantile(degrees):
    assert mass_within(student_t95(degrees), degrees) == pytest.approx(0.95, abs=6e-6)


def test_beyond_the_table_the_interval_is_a_little_too_wide():
    assert student_t95(1000) == student_t95(30)
    assert 0.95 < mass_within(student_t95(1000), 1000) < 0.96
    with pytest.raises(ValueError, match="two values"):
        student_t95(0)


@given(
    st.dictionaries(st.integers(0, 9), st.tuples(*[st.floats(0.1, 100)] * 2), min_size=2),
    st.floats(0.5, 2),
)
def test_what_a_seed_does_to_both_cancels(pairs, factor):
    ours = {seed: a for seed, (a, _) in pairs.items()}
    baseline = {seed: b for seed, (_, b) in pairs.items()}
    shared = {seed: (seed + 1) / 3 for seed in pairs}
    ratio = paired_ratio(ours, baseline)
    moved = paired_ratio(
        {s: factor * shared[s] * v for s, v in ours.items()},
        {s: shared[s] * v for s, v in baseline.items()},
    )
    assert ratio.low <= ratio.mean <= ratio.high
    for bound in ("low", "mean", "high"):
        assert getattr(moved, bound) == pytest.approx(factor * getattr(ratio, bound), rel=1e-6)


def test_only_seeds_of_both_count():
    ratio = paired_ratio({1: 2.0, 2: 8.0, 3: 99.0}, {2: 2.0, 1: 2.0, 4: 1.0})
    assert (ratio.mean, ratio.seeds) == (pytest.approx(2), (1, 2))
    assert ratio.high == pytest.approx(2 * math.exp(12.7062 * math.log(2)), rel=1e-4)
    single = paired_ratio({1: 3.0}, {1: 2.0, 2: 5.0})
    assert (single.mean, single.low, single.high) == (pytest.approx(1.5), None, None)
    assert paired_ratio({1: 3.0}, {2: 3.0}) is None


def test_19_of_20_intervals_hold_the_true_ratio():
    draw, hits = random.Random(0), 0
    for _ in range(2000):
        data = {seed: draw.gauss(3, 1) for seed in range(3)}
        ours = {s: math.exp(v + 0.1 + draw.gauss(0, 0.02)) for s, v in data.items()}
        ratio = paired_ratio(ours, {s: math.exp(v) for s, v in data.items()})
        hits += ratio.low <= math.exp(0.1) <= ratio.high
    assert hits / 2000 == pytest.approx(0.95, abs=0.015)


def test_running_mean():
    assert running_mean([4, 2, 6, 0], 2) == [4, 3, 4, 3]
    assert running_mean([4, 2, 6, 0], 1) == [4, 2, 6, 0]
    assert running_mean([4, 2, 6], 9) == [4, 3, 4]
