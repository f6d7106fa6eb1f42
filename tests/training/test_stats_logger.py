"""StatsLogger on one process, with layers that only have counters."""

import json
import math
import re
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_moe_comp.compression.random_stream import TrainingStep
from megatron_moe_comp.options.config import CompressionConfig
from megatron_moe_comp.stats import phase_times
from megatron_moe_comp.stats.comm_stats import CommStats
from megatron_moe_comp.stats.phase_times import PHASES
from megatron_moe_comp.stats.text import describe
from megatron_moe_comp.training import hooks, log_outputs, stats_logger
from megatron_moe_comp.training.stats_logger import PANELS, StatsLogger, scalars_of


class Writer:
    def __init__(self):
        self.values, self.histograms, self.layouts = [], [], []

    def add_scalar(self, name, value, iteration):
        self.values.append((name, value, iteration))

    def add_histogram_raw(self, name, **values):
        self.histograms.append((name, values))

    def add_custom_scalars(self, layout):
        self.layouts.append(layout)


@pytest.fixture
def logger(monkeypatch, tmp_path):
    """A logger of two layers, its clock in `now`, and what it writes to TensorBoard."""
    writer = Writer()
    clock = [0.0]
    monkeypatch.setattr(phase_times.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(stats_logger.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(stats_logger, "sum_over_ranks", lambda values: values)
    monkeypatch.setattr(stats_logger, "is_rank0", lambda: True)
    monkeypatch.setattr(hooks, "finalize_model_grads", lambda *args: None)
    monkeypatch.setattr(log_outputs, "get_tensorboard_writer", lambda: writer)
    monkeypatch.setattr(log_outputs, "get_wandb_writer", lambda: None)
    config = CompressionConfig(
        moe_a2a_compress="birdmoe",
        moe_a2a_dedup=True,
        moe_a2a_stats_json=str(tmp_path / "new/a2a.json"),
        moe_a2a_stats_jsonl=str(tmp_path / "new/a2a.jsonl"),
    )
    now = [0]
    args = Namespace(log_interval=2, train_iters=10)
    logger = StatsLogger(config, lambda: TrainingStep(now[0], 1), args)
    model = SimpleNamespace(
        transformer=SimpleNamespace(finalize_model_grads_func=None),
        post_wrap_hooks=[],
    )
    logger.attach(model, ["layer 1", "layer 2", "layer 3"])
    logger._layers = [SimpleNamespace(layer_number=n, stats=CommStats()) for n in (1, 3)]
    return SimpleNamespace(
        it=logger,
        now=now,
        clock=clock,
        written=writer.values,
        writer=writer,
        args=args,
        end_step=model.transformer.finalize_model_grads_func,
        json=tmp_path / "new/a2a.json",
        records=lambda: [
            json.loads(line) for line in (tmp_path / "new/a2a.jsonl").read_text().splitlines()
        ],
    )


def train(logger, iterations, raw=4000, sent=1000):
    for iteration in iterations:
        logger.now[0] = iteration
        for layer in logger.it._layers:
            layer.stats.add_bytes("dispatch_fwd", raw, sent)
            layer.stats.add_rows("dispatch_fwd", 10, 8, [(8, 5)])
            layer.stats.add_load("dispatch_fwd", (3000, 900, 500), (6000, 1800, 1000))
            with layer.stats.timed("decode", torch.device("cpu")):
                logger.clock[0] += 0.5
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


def test_every_interval_has_a_record(logger):
    train(logger, range(2))
    train(logger, range(2, 4), raw=8000)
    first, second = logger.records()
    assert [first["iteration"], first["train_iters"], first["ranks"]] == [2, 10, 1]
    assert first["setting"] == "birdmoe 6 bit optimal dedup"
    assert (first["raw_bytes"], first["wire_bytes"]) == (8000, 2000)
    assert second["wires"]["dispatch_fwd"]["raw_bytes"] == second["raw_bytes"] == 16000
    assert second["rows_of_bits"] == {"5": 32}
    assert second["most_loaded_node"]["bytes"] == 1000
    assert second["loss"] is second["lsh"] is None
    assert (first["seconds_per_iteration"], second["seconds_per_iteration"]) == (1, 1)
    assert "layers" not in second


def test_losses_are_means_over_the_tokens_of_training(logger):
    reports = iter([(6.0, 2.0), (1.0, 2.0), (100.0, 1.0), (math.inf, 1.0), (4.0, 2.0)])

    def forward_step(iterator, model):
        return "output", lambda output: (0, 1, {"lm loss": torch.tensor(next(reports))})

    step = logger.it.watched(forward_step)
    for _ in range(2):
        output, loss_function = step(None, None)
        assert loss_function(output)[:2] == (0, 1)
    with torch.no_grad():
        loss_function(output)
    train(logger, range(2))
    loss_function(output)
    train(logger, range(2, 4))
    loss_function(output)
    train(logger, range(4, 6))
    assert [record["loss"] for record in logger.records()] == [7 / 4, None, 2.0]


@pytest.mark.parametrize("result", [3.0, (1, 2), (1, {"loss": torch.ones(2)}), (1, 2, None)])
def test_a_script_may_report_no_loss(logger, result):
    step = logger.it.watched(lambda *_: ("output", lambda output: result))
    assert step(None, None)[1]("output") is result
    train(logger, range(2))
    assert logger.records()[0]["loss"] is None


def test_the_end_is_recorded(logger):
    train(logger, range(2))
    logger.it.finish()
    record, last = logger.records()
    assert last == record | {"ended": True}


def test_the_iterations_since_the_last_interval_are_recorded_at_the_end(logger):
    train(logger, range(3))
    logger.it.finish()
    record, last = logger.records()
    assert (record["iteration"], last["iteration"], last["ended"]) == (2, 3, True)
    assert last["wire_bytes"] == record["wire_bytes"]


def test_a_file_that_cannot_be_written_any_more_ends_nothing(logger, capsys):
    train(logger, range(2))
    path = logger.it._compression.moe_a2a_stats_jsonl
    Path(path).unlink()
    Path(path).mkdir()
    train(logger, range(2, 4))
    assert f"--moe-a2a-stats-jsonl={path}: not written, Is a directory." in capsys.readouterr().out


def test_one_iteration_in_ten_is_timed(logger):
    train(logger, range(9))
    assert all(record["phase_seconds"] is None for record in logger.records())
    train(logger, range(9, 14))
    of_tenth, of_eleventh, of_others = [r["phase_seconds"] for r in logger.records()[4:]]
    assert of_tenth is of_others is None
    assert list(of_eleventh) == list(PHASES)
    assert of_eleventh["decode"] == 1.0
    assert of_eleventh["encode"] == 0
    names = {name for name, *_ in logger.written}
    assert "moe-a2a/phase-ms-decode" in names


def test_a_timed_iteration_that_runs_again_counts_twice(logger):
    train(logger, [*range(10), 9, 10, 10, 11])
    assert logger.records()[-1]["phase_seconds"]["decode"] == 1.0


def test_what_belongs_together_is_drawn_together(logger):
    """Every chart of TensorBoard's custom scalars has lines, and bits are a histogram."""
    logger.it._layers[0].stats.add_error("combine_fwd", torch.ones(1, 1), torch.zeros(1, 1))
    train(logger, range(12))
    (layout,) = logger.writer.layouts
    (charts,) = layout.values()
    assert list(charts) == list(PANELS)
    names = {name for name, *_ in logger.written}
    for kind, patterns in charts.values():
        assert kind == "Multiline"
        for pattern in patterns:
            assert [name for name in names if re.fullmatch(pattern, name)], pattern
    name, values = logger.writer.histograms[-1]
    assert name == "moe-a2a/bits"
    assert (values["num"], values["bucket_counts"], values["bucket_limits"]) == (32, [32], [5.5])
    assert values["global_step"] == 12


def test_figures_that_were_not_measured_are_not_drawn(logger):
    train(logger, range(2))
    (record,) = logger.records()
    assert None not in scalars_of(record).values()
    assert "sqnr-db-combine-fwd" not in scalars_of(record)


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
    assert "Most loaded node, per layer and micro-batch: 6.0 kB as float32, 1.8 kB" in printed
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


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_a_file_that_cannot_be_written_is_refused_at_start(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(stats_logger, "is_rank0", lambda: True)
    (tmp_path / "file").write_text("")
    path = tmp_path / "file/a2a.json"
    config = CompressionConfig(**{f"moe_a2a_stats_{kind}": str(path)})
    logger = StatsLogger(config, lambda: None, Namespace())
    with pytest.raises(ValueError, match=rf"-stats-{kind}=.*directory that you may write"):
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
    assert describe(CompressionConfig(**options)) == words


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
    monkeypatch.setattr(stats_logger.ops, "is_compiled", lambda device, op: compiled)
    assert stats_logger._kernels(CompressionConfig(moe_a2a_compress=method)) == words
