import json
import math
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_moe_comp.compression.wires import WIRES
from megatron_moe_comp.options.config import CompressionConfig
from megatron_moe_comp.stats import comm_stats
from megatron_moe_comp.stats.comm_stats import Column, CommStats, sqnr_db, summarize

CLUSTERING = [
    Column.CLUSTERED_ROWS,
    Column.CENTROIDS,
    Column.CLUSTERED_SQUARE,
    Column.RESIDUAL_SQUARE,
    Column.FLOPS_SAVED,
]
BIRDMOE = CompressionConfig(moe_a2a_compress="birdmoe", moe_a2a_bits=4)


def test_counters_add_up_by_wire():
    stats = CommStats()
    stats.add_bytes("combine_bwd", 100, 20)
    stats.add_bytes("combine_bwd", 50, 10)
    x = torch.tensor([[3.0, 4.0]])
    stats.add_error("combine_bwd", x, x + torch.tensor([[0.0, 1.0]]))
    stats.add_error("combine_bwd", x.bfloat16(), x.bfloat16())
    stats.add_error("combine_bwd", torch.tensor([[math.inf, 1.0]]), x)  # does not count
    stats.add_rows("combine_bwd", 7, 5, [(3, 4), (1, 8)])
    stats.add_rows("combine_bwd", 2, 2, [(2, 4), (0, 2)])
    stats.add_load("combine_bwd", (1000, 200, 100))
    stats.add_load("combine_bwd", (10, 20, 30), (1, 2, 3))
    totals = stats.totals()
    row = dict(zip(Column, totals[WIRES.index("combine_bwd")].tolist(), strict=True))
    assert {column: count for column, count in row.items() if count} == {
        Column.RAW: 150,
        Column.WIRE: 30,
        Column.SIGNAL: 50,
        Column.NOISE: 1,
        Column.PAIRS: 9,
        Column.ROWS: 7,
        Column.ROWS_4_BITS: 5,
        Column.ROWS_8_BITS: 1,
        Column.PASSES: 2,
        Column.LOAD_RAW: 1010,
        Column.LOAD_UNIFORM: 220,
        Column.LOAD: 130,
        Column.NODE_PASSES: 1,
        Column.NODE_LOAD_RAW: 1,
        Column.NODE_LOAD_UNIFORM: 2,
        Column.NODE_LOAD: 3,
    }
    assert totals.sum() == sum(row.values())


def test_evaluation_is_not_counted():
    stats = CommStats()
    stats.counting = False
    stats.add_bytes("dispatch_fwd", 100, 20)
    stats.add_clusters(100, 20)
    stats.phases.start()
    with stats.timed("encode", torch.device("cpu")):
        pass
    assert not stats.totals().any()
    assert not stats.phases.seconds()["encode"]
    stats.counting = True
    with stats.timed("encode", torch.device("cpu")):
        pass
    assert stats.phases.seconds()["encode"] > 0


def test_clusters_are_counted_with_the_first_wire():
    stats = CommStats()
    stats.flops_per_row = 10
    stats.add_clusters(100, 20)
    stats.add_clusters(50, 50)
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    stats.add_residual(x, x)
    stats.add_residual(x.bfloat16(), torch.tensor([[3.0, 2.0], [0.0, 0.0]]))
    totals = stats.totals()
    row = dict(zip(Column, totals[WIRES.index("dispatch_fwd")].tolist(), strict=True))
    assert {column: count for column, count in row.items() if count} == {
        Column.CLUSTERED_ROWS: 150,
        Column.CENTROIDS: 70,
        Column.CLUSTERED_SQUARE: 52,
        Column.RESIDUAL_SQUARE: 5,
        Column.FLOPS_SAVED: 800,
    }
    assert totals.sum() == sum(row.values())


def test_summary_of_clusters():
    totals = torch.zeros(3, len(WIRES), len(Column), dtype=torch.float64)
    totals[0, 0, CLUSTERING] = torch.tensor([100.0, 20, 16, 4, 1e9], dtype=torch.float64)
    totals[1, 0, CLUSTERING] = torch.tensor([300.0, 60, 0, 0, 0], dtype=torch.float64)
    report = summarize(totals, {1: "a", 2: "b", 3: "c"}, CompressionConfig(moe_a2a_compress="lsh"))
    overall = {
        "rows": 400,
        "centroids": 80,
        "rate": 0.2,
        "residual_norm": 0.5,
        "expert_flops_saved": 1e9,
    }
    assert report["lsh"] == overall
    layers = [layer["lsh"] for layer in report["layers"]]
    assert layers[0] == overall | {"rows": 100, "centroids": 20}
    assert layers[1] == {
        "rows": 300,
        "centroids": 60,
        "rate": 0.2,
        "residual_norm": None,
        "expert_flops_saved": 0,
    }
    assert (layers[2]["rows"], layers[2]["rate"], layers[2]["residual_norm"]) == (0, None, None)
    assert json.loads(json.dumps(report)) == report
    assert summarize(totals, {1: "a", 2: "b", 3: "c"}, BIRDMOE)["lsh"] is None


def test_summary():
    totals = torch.zeros(2, len(WIRES), len(Column), dtype=torch.float64)
    totals[:, :, Column.RAW], totals[:, :, Column.WIRE] = 1000, 200
    totals[1, 0, Column.RAW] = 3000
    totals[0, 0, Column.SIGNAL], totals[0, 0, Column.NOISE] = 100, 1
    report = summarize(totals, {1: "a", 3: "c"}, BIRDMOE)
    assert (report["method"], report["bits"]) == ("birdmoe", 4)
    assert report["ratio_fp32"] == 10000 / 1600
    assert report["ratio_bf16"] == 10000 / 3200
    assert report["wires"]["dispatch_fwd"] == {
        "raw_bytes": 4000,
        "wire_bytes": 400,
        "sqnr_db": pytest.approx(20),
    }
    assert report["wires"]["combine_fwd"]["sqnr_db"] is None
    assert report["mean_bits"] is None
    assert report["most_loaded_rank"] is None
    assert [(layer["layer"], layer["ratio_fp32"]) for layer in report["layers"]] == [
        (1, 5.0),
        (3, 7.5),
    ]


def test_loads_are_means_over_passes_summed_over_wires():
    totals = torch.zeros(2, len(WIRES), len(Column), dtype=torch.float64)
    totals[:, :, Column.PASSES] = torch.tensor([4.0, 4.0, 2.0, 2.0])
    totals[0, :, Column.LOAD_RAW] = 400
    totals[0, :, Column.LOAD_UNIFORM] = 40
    totals[:, :, Column.LOAD] = 20
    totals[0, :, Column.NODE_LOAD] = 40
    totals[0, :, Column.NODE_PASSES] = 1  # other expert-parallel groups are within a node
    totals[0, 0, Column.ROWS_4_BITS] = 10
    totals[0, 1, Column.ROWS_5_BITS] = 10
    totals[0, :, Column.PAIRS], totals[0, :, Column.ROWS] = 12, 9
    report = summarize(totals, {1: "a", 2: "b"}, BIRDMOE)
    loads = [layer["most_loaded_rank"] for layer in report["layers"]]
    assert loads[0] == {"float32_bytes": 600, "uniform_bytes": 60, "bytes": 30}
    assert loads[1] == {"float32_bytes": 0, "uniform_bytes": 0, "bytes": 30}
    assert report["most_loaded_rank"] == {"float32_bytes": 300, "uniform_bytes": 30, "bytes": 30}
    of_node = {"float32_bytes": 0, "uniform_bytes": 0, "bytes": 160}
    assert [layer["most_loaded_node"] for layer in report["layers"]] == [of_node, None]
    assert report["mean_bits"] == report["layers"][0]["mean_bits"] == 4.5
    assert report["rows_of_bits"] == {4: 10, 5: 10}
    assert report["layers"][1]["mean_bits"] is None
    assert report["layers"][1]["rows_of_bits"] is None
    assert (report["pairs"], report["rows"]) == (48, 36)
    assert (report["bits"], report["bit_policy"]) == (4, "optimal")


def test_a_fixed_width_has_no_bits():
    totals = torch.ones(1, len(WIRES), len(Column), dtype=torch.float64)
    report = summarize(totals, {1: "a"}, CompressionConfig(moe_a2a_compress="fp8"))
    assert report["bits"] is report["mean_bits"] is report["rows_of_bits"] is None


def test_nothing_sent():
    report = summarize(torch.zeros(0, len(WIRES), len(Column)), {}, CompressionConfig())
    assert report["ratio_fp32"] is None
    assert report["ratio_bf16"] is None
    assert report["bits"] is None
    assert report["layers"] == []


@pytest.mark.parametrize(("signal", "noise"), [(0, 1), (1, 0), (math.nan, 1), (1, math.nan)])
def test_no_ratio_without_signal_and_noise(signal, noise):
    assert sqnr_db(signal, noise) is None


def with_other_columns():
    """The module with its columns in reverse order, and one more at either end."""
    number = len(Column)
    text = Path(comm_stats.__file__).read_text()
    text = re.sub(r"(?m)^(    [A-Z_0-9]+ = )(\d+)$", lambda m: f"{m[1]}{number - int(m[2])}", text)
    head = "class Column(IntEnum):"
    text = text.replace(head, f"{head}\n    A = 0\n    Z = {number + 1}")
    module = ModuleType("other_comm_stats")
    exec(text, module.__dict__)
    return module


def test_the_order_of_columns_does_not_matter():
    reports = []
    for module in (comm_stats, with_other_columns()):
        stats = module.CommStats()
        stats.flops_per_row = 10
        x = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
        stats.add_bytes("combine_fwd", 1000, 100)
        stats.add_rows("combine_fwd", 7, 5, [(3, 4), (1, 8)])
        stats.add_load("combine_fwd", (1000, 200, 100), (1, 2, 3))
        stats.add_error("combine_fwd", x, x + 1)
        stats.add_clusters(100, 20)
        stats.add_residual(x, x / 2)
        config = CompressionConfig(moe_a2a_compress="lsh", moe_a2a_codec="rq")
        reports.append(module.summarize(stats.totals()[None], {1: "a"}, config))
    assert reports[0] == reports[1]
    assert reports[0]["lsh"]["rate"] == 0.2
