"""Parallel layouts in which every pair of values occurs; see layouts.check for what must hold."""

import itertools

import pytest

from tests.end_to_end.layouts import FACTORS, check, pairwise_layouts

LAYOUTS = pairwise_layouts()


def test_every_pair_of_values_occurs():
    for (one, values), (other, others) in itertools.combinations(FACTORS.items(), 2):
        for pair in itertools.product(values, others):
            assert any((getattr(x, one), getattr(x, other)) == pair for x in LAYOUTS), pair


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layout(layout):
    wrong, _ = check(layout)
    assert not wrong, "\n".join(wrong)
