import math

import pytest
import torch

from megatron_moe_comp.compression.codecs.pwlq import PiecewiseLinearQuantization
from tests.compression.variants import RANDOM, all_bits, normal_rows, plan, roundtrip

CODEC = PiecewiseLinearQuantization()


def scales_of(rows, num_bits=6):
    packet = plan(CODEC, rows, (len(rows),), num_bits)
    message = packet.encode(rows, [], RANDOM)
    offset = packet.segments[0][1][0].offsets[1]
    return message[offset : offset + 8 * len(rows)].clone().view(torch.float32).view(-1, 2)


def test_the_breakpoint():
    rows = normal_rows(num_rows=3)
    for row, (breakpoint_, largest) in zip(rows.double(), scales_of(rows), strict=True):
        assert largest == row.abs().max().float()
        ratio = (row.abs().max() / row.square().mean().sqrt()).item()
        expected = math.log(0.8614 * ratio + 0.6079) / ratio
        assert (breakpoint_ / largest).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("num_bits", all_bits(CODEC))
def test_values_become_the_nearest_level(num_bits):
    rows = normal_rows(num_rows=8)
    rows[0, 0] = 40.0
    count = 2 ** (num_bits - 2)
    decoded = roundtrip(CODEC, rows, num_bits=num_bits)
    for row, arrived, (p, m) in zip(rows, decoded, scales_of(rows, num_bits), strict=True):
        dense = torch.arange(count) / count * p
        tail = p + torch.arange(count) / (count - 1) * (m - p)
        levels = torch.cat((dense, tail))
        levels = torch.cat((-levels, levels))
        best = (row[:, None] - levels).abs().amin(1)
        torch.testing.assert_close((arrived - row).abs(), best, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            (arrived[:, None] - levels).abs().amin(1), torch.zeros(256), rtol=0, atol=1e-5
        )


def test_it_beats_even_steps_where_tails_are_long():
    rows = normal_rows(num_rows=64)
    rows[:, 0] = 12.0
    errors = (roundtrip(CODEC, rows, num_bits=4) - rows).square().mean()
    even_step = 12.0 / 7
    even = ((rows / even_step).round() * even_step - rows).square().mean()
    assert errors < even / 2
