"""Whole training runs with the entry script: equal to stock Megatron and to themselves."""

import gzip
import json
import math
from collections import Counter
from datetime import UTC, datetime

import pytest
from rich.console import Console

from megatron_moe_comp.watch import read_records, view
from tests.end_to_end.forks import launch
from tests.end_to_end.runs import STOCK, train

BIRDMOE = "--moe-a2a-compress=birdmoe"
LAYOUTS = {
    "EP2": (2, ""),
    "EP2 DP2 distributed optimizer bf16": (4, "--use-distributed-optimizer --bf16"),
}


def directory(base, name):
    path = base / name
    path.mkdir()
    return path


@pytest.mark.parametrize(("ranks", "options"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_none_equals_stock_megatron_step_by_step(tmp_path, ranks, options):
    stock = train(directory(tmp_path, "stock"), options, script=STOCK, ranks=ranks)
    options += " --moe-a2a-compress=none"
    ours = train(directory(tmp_path, "none"), options, ranks=ranks, launch=launch)
    assert ours.history() == stock.history()
    assert len(ours.history()["lm loss"]) == 6


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """An uninterrupted birdmoe run with dropout that saved at iterations 3 and 6; 5 is profiled."""
    base = tmp_path_factory.mktemp("plain")
    options = f"{BIRDMOE} --use-distributed-optimizer --save {base}/checkpoints --save-interval 3"
    options += f" --wandb-project test --wandb-exp-name test --wandb-save-dir {base}"
    options += " --profile --use-pytorch-profiler --profile-step-start 4 --profile-step-end 5"
    options += f" --moe-a2a-stats-json {base}/a2a.json --moe-a2a-stats-jsonl {base}/a2a.jsonl"
    return base, train(base, options)


def test_resuming_repeats_the_uninterrupted_run(plain, tmp_path):
    base, whole = plain
    options = f"{BIRDMOE} --use-distributed-optimizer --load {base}/checkpoints --ckpt-step 3"
    resumed = train(tmp_path, options, launch=launch).history()
    for tag, values in whole.history().items():
        assert resumed[tag] == {step: values[step] for step in (4, 5, 6)}, tag


def test_recomputation_changes_nothing(plain, tmp_path):
    # Dropout is on; its masks, too, are replayed.
    recompute = "--recompute-granularity selective --recompute-modules moe"
    run = train(tmp_path, f"{BIRDMOE} --use-distributed-optimizer {recompute}", launch=launch)
    assert run.history() == plain[1].history()


LSH = """
    --moe-a2a-compress=lsh --moe-lsh-target-rate 0.3 --moe-lsh-warmup-iters 4
    --moe-lsh-residual identity --moe-lsh-refine 1 --use-distributed-optimizer
"""


def test_resuming_repeats_what_clustering_adapted(tmp_path):
    saved = directory(tmp_path, "saved")
    options = f"{LSH} --save {saved}/checkpoints --save-interval 3"
    whole = train(saved, options, launch=launch).history()
    options = f"{LSH} --load {saved}/checkpoints --ckpt-step 3"
    resumed = train(directory(tmp_path, "resumed"), options, launch=launch).history()
    for tag, values in whole.items():
        assert resumed[tag] == {step: values[step] for step in (4, 5, 6)}, tag


def test_statistics_of_a_run(plain):
    base, run = plain
    report = json.loads((base / "a2a.json").read_text())
    assert report["method"] == "birdmoe"
    assert report["bits"] == 6
    assert report["ratio_bf16"] == report["ratio_fp32"] / 2
    assert list(report["wires"]) == ["dispatch_fwd", "combine_fwd", "combine_bwd", "dispatch_bwd"]
    assert [layer["layer"] for layer in report["layers"]] == [1, 2]
    for wire, total in report["wires"].items():
        layers = [layer["wires"][wire] for layer in report["layers"]]
        assert total["raw_bytes"] == sum(layer["raw_bytes"] for layer in layers)
        assert total["wire_bytes"] == sum(layer["wire_bytes"] for layer in layers)
        assert total["sqnr_db"] > 20
    # The same tokens take the four wires; probabilities travel with two of them.
    raw = {wire: total["raw_bytes"] for wire, total in report["wires"].items()}
    assert raw["dispatch_fwd"] == raw["dispatch_bwd"]
    assert raw["combine_fwd"] == raw["combine_bwd"]
    assert raw["dispatch_fwd"] * 64 == raw["combine_fwd"] * 65
    assert run.output.count("all-to-all birdmoe 6 bit optimal | iteration") == 6
    assert "Total compression" in run.output
    scalars = run.scalars
    assert len(scalars["moe-a2a/ratio-fp32"]) == 6
    (wandb_log,) = base.glob("wandb/offline-run-*/*.wandb")
    assert wandb_log.read_bytes().count(b"moe-a2a/ratio-fp32") >= 6
    sent = sum(total["wire_bytes"] for total in report["wires"].values())
    assert math.isclose(sum(scalars["moe-a2a/wire-MB"].values()) * 1e6, sent, rel_tol=1e-5)


def test_phases_are_in_the_profile_of_every_rank(plain):
    traces = list(plain[0].glob("torch_profile/rank-*.json.gz"))
    assert len(traces) == 2
    for trace in traces:
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        names = Counter(event.get("name") for event in events)
        passes = 2 * 2  # layers and micro-batches
        assert names["moe-a2a/encode"] == names["moe-a2a/decode"] == 4 * passes
        assert names["moe-a2a/experts"] == passes
        assert names["moe-a2a/transfer"] >= 4 * passes


def test_every_interval_of_a_run_has_a_record(plain):
    base, run = plain
    records = read_records(base / "a2a.jsonl")
    assert [record["iteration"] for record in records] == list(run.history()["lm loss"])
    for record in records:
        losses = run.scalars["lm loss"]
        assert math.isclose(record["loss"], losses[record["iteration"]], rel_tol=1e-5)
        assert record["ranks"] == 2
        assert record["train_iters"] == 6
    console = Console(width=120)
    with console.capture() as capture:
        console.print(view(records, datetime.now(UTC)))
    assert "iteration 6 of 6" in capture.get()


# The other layouts, and their combinations, are test_layouts.py's.
TP2 = "--tensor-model-parallel-size 2 --expert-tensor-parallel-size 1 --sequence-parallel"
PARALLEL = {
    "TP2 SP": (2, TP2),
    "PP2": (4, "--pipeline-model-parallel-size 2 --use-distributed-optimizer"),
}


@pytest.mark.parametrize(("ranks", "options"), PARALLEL.values(), ids=PARALLEL.keys())
def test_parallel_layouts_train_near_none(tmp_path, ranks, options):
    forks = {"ranks": ranks, "launch": launch}
    none = train(directory(tmp_path, "none"), options, **forks).history()
    ours = train(directory(tmp_path, "ours"), f"{options} {BIRDMOE}", **forks).history()
    assert ours["lm loss"] != none["lm loss"]
    for step, loss in none["lm loss"].items():
        assert ours["lm loss"][step] == pytest.approx(loss, rel=0.01)
        assert ours["grad-norm"][step] == pytest.approx(none["grad-norm"][step], rel=0.1)


def test_a_bad_value_ends_every_rank(tmp_path):
    run = train(tmp_path, f"{BIRDMOE} --moe-a2a-bits=9")
    assert run.returncode != 0
    # The launcher ends the others as soon as one has failed.
    assert "ValueError: --moe-a2a-bits=9: " in run.output
    assert "training ..." not in run.output


def test_an_orderly_stop_still_reports(tmp_path):
    run = train(tmp_path, f"{BIRDMOE} --exit-interval 2")
    assert run.returncode == 0
    assert len(run.history()["lm loss"]) == 2
    assert "Total compression" in run.output


@pytest.mark.slow
def test_an_error_while_saving_ends_every_rank(tmp_path):
    """With --exit-signal-handler data workers do not heed the signal that ends them."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/iter_0000006").touch()
    saving = f"--save {tmp_path}/checkpoints --save-interval 100 --ckpt-format torch"
    run = train(tmp_path, f"{BIRDMOE} {saving} --exit-signal-handler --num-workers 2")
    assert run.returncode == 1
    assert "NotADirectoryError" in run.output
