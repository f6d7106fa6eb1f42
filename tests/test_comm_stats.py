import math

import pytest
import torch

from megatron_moe_comp.comm_stats import (
    NOISE,
    NUM_COLUMNS,
    RAW,
    SIGNAL,
    WIRE,
    CommStats,
    sqnr_db,
    summarize,
)
from megatron_moe_comp.config import WIRES, CompressionConfig

BIRDMOE = CompressionConfig(moe_a2a_compress="birdmoe", moe_a2a_bits=4)


def test_counters_add_up_by_wire():
    stats = CommStats()
    stats.add_bytes("combine_bwd", 100, 20)
    stats.add_bytes("combine_bwd", 50, 10)
    x = torch.tensor([[3.0, 4.0]])
    stats.add_error("combine_bwd", x, x + torch.tensor([[0.0, 1.0]]))
    stats.add_error("combine_bwd", x.bfloat16(), x.bfloat16())
    totals = stats.totals()
    assert totals[WIRES.index("combine_bwd")].tolist() == [150, 30, 50, 1]
    assert totals.sum() == 231


def test_evaluation_is_not_counted():
    stats = CommStats()
    stats.counting = False
    stats.add_bytes("dispatch_fwd", 100, 20)
    assert not stats.totals().any()


def test_summary():
    totals = torch.zeros(2, len(WIRES), NUM_COLUMNS, dtype=torch.float64)
    totals[:, :, RAW], totals[:, :, WIRE] = 1000, 200
    totals[1, 0, RAW] = 3000
    totals[0, 0, SIGNAL], totals[0, 0, NOISE] = 100, 1
    report = summarize(totals, [1, 3], BIRDMOE)
    assert (report["method"], report["bits"]) == ("birdmoe", 4)
    assert report["ratio_fp32"] == 10000 / 1600
    assert report["ratio_bf16"] == 10000 / 3200
    assert report["wires"]["dispatch_fwd"] == {
        "raw_bytes": 4000,
        "wire_bytes": 400,
        "sqnr_db": pytest.approx(20),
    }
    assert report["wires"]["combine_fwd"]["sqnr_db"] is None
    assert [(layer["layer"], layer["ratio_fp32"]) for layer in report["layers"]] == [
        (1, 5.0),
        (3, 7.5),
    ]


def test_nothing_sent():
    report = summarize(torch.zeros(0, len(WIRES), NUM_COLUMNS), [], CompressionConfig())
    assert report["ratio_fp32"] is None
    assert report["ratio_bf16"] is None
    assert report["bits"] is None
    assert report["layers"] == []


@pytest.mark.parametrize(("signal", "noise"), [(0, 1), (1, 0), (math.nan, 1), (1, math.nan)])
def test_no_ratio_without_signal_and_noise(signal, noise):
    assert sqnr_db(signal, noise) is None
