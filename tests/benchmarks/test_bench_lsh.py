"""The benchmark's options, rows and what it refuses; never its figures."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import bench_lsh
import lsh_layer

KEYS = ["device", "dtype", "tokens", "family", "variant", "impl", "coordinates", "rate"]
KEYS += ["stages", "added", "saved", "ratio"]
STAGES = ["hash", "cluster", "mean", "restore", "backward"]
TINY = "--tokens 64 --hidden 16 --rounds 1"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(bench_lsh.ops, "is_compiled", lambda device, name: True)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(tmp_path, options):
    path = tmp_path / "rows.json"
    bench_lsh.main([*TINY.split(), *options.split(), "--json", str(path)])
    return json.loads(path.read_text())


def make_cases(batch, options=""):
    return list(bench_lsh.make_cases(batch, bench_lsh.parse_options(options.split())))


def test_every_case_has_a_row(tmp_path, capsys):
    rows = run(tmp_path, "--experts gelu,swiglu")
    cases = [(row["dtype"], row["family"], row["variant"]) for row in rows]
    assert len(set(cases)) == len(cases) == 2 * len(bench_lsh.HASHES) * len(bench_lsh.VARIANTS)
    for row in rows:
        assert list(row) == KEYS
        assert list(row["stages"]) == STAGES
        assert 0 < row["rate"] <= 1
        assert min(row["stages"].values()) > 0
        assert row["added"] == pytest.approx([sum(row["stages"].values())] * 3)  # of one round
        assert set(row["saved"]) == set(row["ratio"]) == {"gelu", "swiglu"}
        for kind in ("gelu", "swiglu"):
            assert row["ratio"][kind][0] == pytest.approx(row["added"][0] / row["saved"][kind][0])
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 3 + len(rows)
    assert {line.count("|") for line in table[1:]} == {len(KEYS) + len(STAGES) + 1}


def test_experts_run_on_all_rows_and_on_the_centroids(tmp_path, monkeypatch):
    calls, run_experts = [], bench_lsh.run_experts

    def record(kind, experts, rows, probs, sizes):
        calls.append((len(sizes), sum(sizes), probs.requires_grad))
        return run_experts(kind, experts, rows, probs, sizes)

    monkeypatch.setattr(bench_lsh, "run_experts", record)
    (row,) = run(tmp_path, "--families spherical --variants plain --dtypes float32")
    of_rows, of_centroids = (8, 128, True), (8, round(128 * row["rate"]), False)
    assert calls == 2 * [of_rows, of_centroids]  # one round after one to warm up


def test_the_rate_is_next_to_the_target():
    batch = lsh_layer.make_batch(64, 16, torch.float32, "cpu")
    for case in make_cases(batch, "--rate 0.5"):
        assert 0.3 < len(case.clusters) / 128 < 0.7, (case.family, case.variant)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_implementations_give_the_same_clusters(dtype):
    batch = lsh_layer.make_batch(64, 16, dtype, "cpu")
    for case in make_cases(batch):
        arguments = case.config, case.hash, case.num_coordinates, batch
        with lsh_layer.References():
            reference = lsh_layer.make_clusters(*arguments)
        clusters = lsh_layer.make_clusters(*arguments)
        assert torch.equal(clusters.order, reference.order)
        assert torch.equal(clusters.offsets, reference.offsets)


def test_the_reference_is_measured_when_asked_for(tmp_path, monkeypatch):
    called = []

    def record(module, name):
        function = getattr(sys.modules[f"megatron_moe_comp.ops.{module}"], name)
        monkeypatch.setattr(
            sys.modules[f"megatron_moe_comp.ops.{module}"],
            name,
            lambda *args: (called.append(name), function(*args))[1],
        )

    record("lsh_hash", "_dense_reference")
    record("cluster_sum", "_sum_reference")
    record("cluster_sum", "_broadcast_reference")
    monkeypatch.setattr(bench_lsh.ops, "is_compiled", lambda device, name: False)
    options = "--impl reference --families spherical --variants plain --dtypes float32"
    (row,) = run(tmp_path, options)
    assert row["impl"] == "reference"
    # Forward and, each as the gradient of the other, backward; in both rounds.
    each_round = ["_dense_reference", "_sum_reference", "_broadcast_reference"]
    assert called.count("_dense_reference") >= 2
    assert called[-5:-2] == each_round
    assert sorted(called[-2:]) == ["_broadcast_reference", "_sum_reference"]


def test_the_reference_is_not_measured_by_accident(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_lsh.ops, "is_compiled", lambda device, name: name != "dense_hash")
    with pytest.raises(SystemExit, match=r"--impl=compiled: dense_hash: no kernel for cpu"):
        run(tmp_path, "")


def test_an_unknown_family_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "--families minhash")
    assert "not one of fast-cross-polytope" in capsys.readouterr().err
