"""StatsLogger on one process, with layers that only have counters."""

import json
from types import SimpleNamespace

import pytest
import torch

from megatron_moe_comp.comm_stats import CommStats
from megatron_moe_comp.compression.random_stream import TrainingStep
from megatron_moe_comp.config import CompressionConfig
from megatron_moe_comp.mcore import log_outputs, stats_logging
from megatron_moe_comp.mcore.stats_logging import StatsLogger


class Writer:
    def __init__(self):
        self.values = []

    def add_scalar(self, name, value, iteration):
        self.values.append((name, value, iteration))


@pytest.fixture
def logger(monkeypatch, tmp_path):
    """A logger of two layers, its clock in `now`, and what it writes to TensorBoard."""
    writer = Writer()
    monkeypatch.setattr(stats_logging, "sum_over_ranks", lambda values: values)
    monkeypatch.setattr(stats_logging, "is_rank0", lambda: True)
    monkeypatch.setattr(stats_logging, "print_rank_0", print)
    monkeypatch.setattr(stats_logging, "finalize_model_grads", lambda *args: None)
    monkeypatch.setattr(log_outputs, "get_tensorboard_writer", lambda: writer)
    monkeypatch.setattr(log_outputs, "get_wandb_writer", lambda: None)
    config = CompressionConfig(
        moe_a2a_compress="birdmoe",
        moe_a2a_dedup=True,
        moe_a2a_stats_json=str(tmp_path / "new/a2a.json"),
    )
    now = [0]
    logger = StatsLogger(config, lambda: TrainingStep(now[0], 1), log_interval=2)
    model = SimpleNamespace(
        transformer=SimpleNamespace(finalize_model_grads_func=None),
        post_wrap_hooks=[],
    )
    logger.attach(model, ["layer 1", "layer 2", "layer 3"])
    logger._layers = [SimpleNamespace(layer_number=n, stats=CommStats()) for n in (1, 3)]
    return SimpleNamespace(
        it=logger,
        now=now,
        written=writer.values,
        end_step=model.transformer.finalize_model_grads_func,
        json=tmp_path / "new/a2a.json",
    )


def train(logger, iterations, raw=4000, sent=1000):
    for iteration in iterations:
        logger.now[0] = iteration
        for layer in logger.it._layers:
            layer.stats.add_bytes("dispatch_fwd", raw, sent)
            layer.stats.add_rows("dispatch_fwd", 10, 8, [(8, 5)])
            layer.stats.add_load("dispatch_fwd", 3000, 900, 500)
        logger.end_step([])


@pytest.fixture
def lsh_logger(logger):
    logger.it._compression = CompressionConfig(moe_a2a_compress="lsh")
    return logger


def test_clusters_are_logged(lsh_logger, capsys):
    for layer in lsh_logger.it._layers:
        layer.stats.add_clusters(100, 25)
        layer.stats.add_residual(torch.tensor([[2.0]]), torch.tensor([[1.0]]))
    train(lsh_logger, range(2))
    lsh_logger.it.finish()
    printed = capsys.readouterr().out
    assert "(4.00x) | LSH rate 0.250 |" in printed
    assert ("moe-a2a/lsh-rate", 0.25, 2) in lsh_logger.written
    assert "50 centroids for 200 rows, rate 0.250" in printed
    assert "residual 0.50 of a row's norm." in printed
    assert "fewer rows sent" not in printed


@pytest.mark.parametrize("rows", [0, 100])
def test_what_was_not_measured_of_clusters_is_not_logged(lsh_logger, capsys, rows):
    for layer in lsh_logger.it._layers:
        layer.stats.add_clusters(rows, rows // 4)
    train(lsh_logger, range(2))
    lsh_logger.it.finish()
    printed = capsys.readouterr().out
    assert ("LSH rate" in printed) == ("Clustering: " in printed) == (rows > 0)
    assert "residual" not in printed


def test_a_line_per_interval_with_figures_per_iteration(logger, capsys):
    train(logger, range(2))
    train(logger, range(2, 5), raw=8000)
    lines = [line for line in capsys.readouterr().out.splitlines() if "| iteration" in line]
    assert len(lines) == 2
    assert "iteration        2 | MB per iteration: 0.002 of 0.008 as float32 (4.00x) |" in lines[0]
    assert "iteration        4 | MB per iteration: 0.002 of 0.016 as float32 (8.00x) |" in lines[1]
    assert ("moe-a2a/ratio-fp32", 8.0, 4) in logger.written
    assert ("moe-a2a/mean-bits", 5.0, 4) in logger.written
    assert ("moe-a2a/most-loaded-rank-bytes", 500.0, 4) in logger.written


def test_after_a_resume_the_first_interval_counts_its_own_iterations(logger, capsys):
    train(logger, range(7, 8))
    assert "iteration        8 | MB per iteration: 0.002 of 0.008" in capsys.readouterr().out


def test_an_iteration_that_runs_again_is_logged_once(logger, capsys):
    train(logger, [0, 1, 1])
    assert capsys.readouterr().out.count("| iteration") == 1


def test_the_summary_and_its_json(logger, capsys):
    train(logger, range(3))
    logger.it.finish()
    printed = capsys.readouterr().out
    assert "Total compression 4.00x against float32, 2.00x against bfloat16" in printed
    assert "3.0 kB as float32, 0.9 kB with the same bits for all, 0.5 kB as sent" in printed
    assert "Mean bits per value: 5.00." in printed
    assert "20.0% fewer rows sent" in printed
    assert "layer 3" in printed
    assert "layer 2" not in printed
    report = json.loads(logger.json.read_text())
    assert report["ratio_fp32"] == 4.0
    assert [layer["layer"] for layer in report["layers"]] == [1, 3]
    assert [layer["name"] for layer in report["layers"]] == ["layer 1", "layer 3"]


def test_nothing_crossed_a_wire(logger, capsys):
    train(logger, range(3), raw=0, sent=0)
    logger.it.finish()
    printed = capsys.readouterr().out
    assert "| iteration" not in printed
    assert "nothing crossed a wire" in printed
    assert json.loads(logger.json.read_text())["ratio_fp32"] is None


def test_a_file_that_cannot_be_written_is_refused_at_start(tmp_path, monkeypatch):
    monkeypatch.setattr(stats_logging, "is_rank0", lambda: True)
    (tmp_path / "file").write_text("")
    path = tmp_path / "file/a2a.json"
    logger = StatsLogger(CompressionConfig(moe_a2a_stats_json=str(path)), lambda: None, 1)
    with pytest.raises(ValueError, match=r"--moe-a2a-stats-json=.*directory that you may write"):
        logger.attach(SimpleNamespace(), [])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "none"),
        ({"moe_a2a_compress": "birdmoe"}, "birdmoe 6 bit optimal"),
        ({"moe_a2a_compress": "rq", "moe_a2a_bits": 4}, "rq 4 bit"),
        ({"moe_a2a_compress": "bf16", "moe_a2a_dedup": True}, "bf16 dedup"),
        (
            {
                "moe_a2a_compress": "fp8",
                "moe_a2a_scope": "inter-node",
                "moe_a2a_ranks_per_node": 8,
            },
            "fp8 inter-node",
        ),
    ],
)
def test_describe(options, words):
    assert stats_logging.describe(CompressionConfig(**options)) == words


@pytest.mark.parametrize(
    ("method", "compiled", "words"),
    [
        ("none", True, "none"),
        ("birdmoe", True, "compiled"),
        ("rq", False, "reference (PyTorch)"),
        ("fp8", True, "compiled"),
        ("bf16", False, "reference (PyTorch)"),
        ("int8", True, "PyTorch"),
        ("lsh", True, "compiled"),
        ("lsh", False, "reference (PyTorch)"),
    ],
)
def test_the_start_says_what_encodes(monkeypatch, method, compiled, words):
    monkeypatch.setattr(stats_logging.ops, "is_compiled", lambda device, op: compiled)
    assert stats_logging._kernels(CompressionConfig(moe_a2a_compress=method)) == words
