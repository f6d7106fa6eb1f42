import math
import random
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe_comp.mcore.clustering_state import (
    MOST_HASHES,
    LshState,
    Measurement,
    max_coordinates,
    target_rate,
)
from megatron_moe_comp.options.config import CompressionConfig

ROWS = 4096
SETTLED = 150
"""Iterations after which the rate is held, from whatever state."""


def lsh(**options):
    return CompressionConfig(
        moe_a2a_compress="lsh", **{f"moe_lsh_{k}": v for k, v in options.items()}
    )


def seen(rate):
    return Measurement(ROWS, rate * ROWS)


def train(curve, options, iterations=400, noise=0.0, state=None):
    """Returns the rate of each iteration, of a model whose rate at L coordinates is curve(L)."""
    generator = random.Random(1)
    state = state or LshState.initial(options)
    rates = []
    for iteration in range(iterations):
        rate = curve(state.num_coordinates) * (1 + noise * generator.uniform(-1, 1))
        rates.append(min(max(rate, 1 / ROWS), 1.0))
        state.update(seen(rates[-1]), iteration, options)
        assert 1 <= state.num_coordinates <= max_coordinates(options)
    return rates


def saturating(scale):
    return lambda coordinates: 1 - math.exp(-coordinates / scale)


def blocks(start, growth, dim):
    """A rate that grows within a block like the values that its coordinates can tell apart."""

    def rate(coordinates):
        full, part = divmod(coordinates, dim)
        return min(
            1.0, start * growth**full * growth ** (math.log2(2 * part or 1) / math.log2(2 * dim))
        )

    return rate


def jumps(start, dim):
    """A rate that doubles at the end of each block and nowhere else."""
    return lambda coordinates: min(1.0, start * 2.0 ** (coordinates // dim))


CURVES = {
    "saturating early": saturating(30),
    "saturating late": saturating(200),
    "logistic": lambda x: 1 / (1 + math.exp((90 - x) / 15)),
    "straight": lambda x: x / 256,
    "twice per block": blocks(1 / 64, 2, 16),
    "32 times per block": blocks(1 / 2048, 32, 16),
    "jumping": jumps(1 / 50, 16),
    "jumping late": jumps(1 / 700, 16),
}


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("target", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("curve", CURVES)
def test_the_mean_rate_is_held_at_the_target(curve, target, noise):
    rates = train(CURVES[curve], lsh(target_rate=target), noise=noise)
    assert mean(rates[SETTLED:]) == pytest.approx(target, abs=0.02)


@pytest.mark.parametrize("target", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("curve", ["saturating late", "logistic", "straight", "twice per block"])
def test_every_iterations_rate_is_near_the_target_where_the_curve_has_it(curve, target):
    rates = train(CURVES[curve], lsh(target_rate=target))
    assert max(abs(rate - target) for rate in rates[SETTLED:]) < 0.02


@pytest.mark.parametrize("start", [1, 16, 64])
@pytest.mark.parametrize("family", ["fast-cross-polytope", "spherical"])
def test_it_gets_there_from_any_number_of_hashes_of_any_size(family, start):
    options = lsh(target_rate=0.2, num_hashes=start, hash=family)
    rates = train(saturating(8 * options.moe_lsh_hash_dim), options)
    assert mean(rates[SETTLED:]) == pytest.approx(0.2, abs=0.02)


def test_a_rate_that_drifts_is_followed():
    state, options = LshState.initial(lsh()), lsh()
    for iteration in range(600):
        rate = 1 - math.exp(-state.num_coordinates / (300 - iteration / 3))
        state.update(seen(rate), iteration, options)
        if iteration > SETTLED:
            assert rate == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize(
    ("rate", "limit"), [(0.0, 16 * MOST_HASHES), (1 / ROWS, 16 * MOST_HASHES), (1.0, 1)]
)
def test_a_target_that_cannot_be_reached_ends_at_the_limit(rate, limit):
    options, state = lsh(target_rate=0.2), LshState.initial(lsh(target_rate=0.2))
    train(lambda _: rate, options, state=state)
    assert state.coordinates == limit


def test_a_target_of_one_leaves_nearly_all_rows_alone():
    assert min(train(saturating(30), lsh(target_rate=1.0))[SETTLED:]) > 0.95


@pytest.mark.parametrize("rows", [0.0, 1.0])
def test_without_rows_nothing_adapts(rows):
    options, state = lsh(), LshState.initial(lsh())
    before = state.coordinates
    state.update(Measurement(rows, 0.0), 0, options)
    assert (state.coordinates == before) == (rows == 0)


def test_a_fixed_number_of_hashes_stays():
    options, state = lsh(num_hashes=3), LshState.initial(lsh(num_hashes=3))
    train(saturating(30), options, state=state)
    assert state.num_coordinates == max_coordinates(options) == 3 * 16


def test_most_coordinates():
    assert max_coordinates(lsh()) == MOST_HASHES * 16
    assert max_coordinates(lsh(hash="spherical")) == MOST_HASHES * 5
    assert max_coordinates(lsh(target_rate=0.1, num_hashes=40, hash_dim=3)) == 120


def test_warmup_falls_in_a_straight_line():
    options = lsh(target_rate=0.2, warmup_iters=4)
    rates = [target_rate(options, iteration) for iteration in range(7)]
    assert rates == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])
    assert [target_rate(lsh(target_rate=0.3), i) for i in (0, 9)] == pytest.approx([0.3, 0.3])


def test_an_update_aims_at_the_target_of_the_next_iteration():
    options = lsh(target_rate=0.2, warmup_iters=4)
    for iteration in range(5):
        state = LshState(100.0)
        state.update(seen(target_rate(options, iteration + 1)), iteration, options)
        assert state.coordinates == pytest.approx(100.0)


def test_warmup_starts_with_every_row_alone_and_follows_its_target():
    options = lsh(target_rate=0.2, warmup_iters=400)
    assert LshState.initial(options).num_coordinates == max_coordinates(options)
    rates = train(saturating(40), options, iterations=600)
    assert rates[0] > 0.99
    above = [rate - target_rate(options, iteration) for iteration, rate in enumerate(rates)]
    assert min(above) > -0.02
    # From the finest keys it takes a while to where fewer coordinates make a difference.
    assert max(above) < 0.3
    assert max(above[SETTLED:]) < 0.05
    assert mean(rates[450:]) == pytest.approx(0.2, abs=0.02)


@given(st.lists(st.floats(0, 1)))
def test_no_rate_leads_out_of_the_limits(rates):
    state, options = LshState.initial(lsh()), lsh()
    for iteration, rate in enumerate(rates):
        state.update(seen(rate), iteration, options)
        assert 1 <= state.num_coordinates <= max_coordinates(options)


def test_a_state_with_more_keys_resumes():
    saved = LshState(100.5).state_dict() | {"residual_dot": 1.0, "residual_square": 2.0}
    assert LshState.resumed(saved, lsh()) == LshState(100.5)


def test_a_state_resumes_exactly():
    options, state = lsh(), LshState.initial(lsh())
    train(saturating(30), options, iterations=7, noise=0.1, state=state)
    saved = state.state_dict()
    assert all(type(value) is float for value in saved.values())
    resumed = LshState.resumed(saved, options)
    assert resumed == state
    for each in (state, resumed):
        train(saturating(30), options, iterations=7, noise=0.1, state=each)
    assert resumed == state
    assert resumed.state_dict() != saved


@pytest.mark.parametrize(
    ("options", "coordinates"),
    [
        ({}, 100.5),
        ({"num_hashes": 4}, 64),
        ({"num_hashes": 9}, 144),
        ({"hash": "spherical"}, 80),
        ({"target_rate": 0.5, "num_hashes": 4}, 100.5),
    ],
)
def test_a_state_resumes_within_what_the_options_allow(options, coordinates):
    saved = LshState(100.5).state_dict()
    state = LshState.resumed(saved, lsh(**options))
    assert state == LshState(coordinates)
    assert state.num_coordinates <= max_coordinates(lsh(**options))
