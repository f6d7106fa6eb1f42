"""The runner of quality measurements, with a script in place of training."""

import json
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import quality
from methods import METHODS, WARMS_UP
from training_runs import parse_curve, parse_losses

LOSS_LINE = " validation loss at iteration {} on {} set | lm loss value: {} | lm loss PPL: {} | "
LOG = "\n".join(
    [
        " iteration      600/     600 | consumed samples: 4800 | lm loss: 3.324366E+00 |",
        LOSS_LINE.format(300, "validation", "4.000000E+00", "5.459815E+01"),
        LOSS_LINE.format(600, "validation", "3.509986E+00", "3.344779E+01"),
        "-" * 80,
        LOSS_LINE.format(600, "test", "3.427969E+00", "3.081400E+01"),
    ]
)
LAUNCHER = """
import argparse, json, os, pathlib, subprocess, sys, time
parser = argparse.ArgumentParser()
for flag in ("seed", "train-iters", "moe-a2a-compress", "moe-a2a-stats-json"):
    parser.add_argument("--" + flag)
options, rest = parser.parse_known_args()
with open("calls", "a") as calls:
    print(*sys.argv[1:], file=calls)
print("ranks", os.environ["RANKS"], "threads", os.environ["OMP_NUM_THREADS"])
stats = {"ratio_fp32": 1.0}
perplexity = 30.0 + int(options.seed)
if "--moe-lsh-center" in rest:
    report = ["E1122 05:59:40 1 torch/distributed/elastic/api.py:1] failed"] + 50 * ["traceback"]
    sys.exit("\\n".join(["ValueError: no centre", *report]))
if "--moe-lsh-hash=random" in rest:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); "
    rank = subprocess.Popen(
        [sys.executable, "-c", code + "time.sleep(600)"],
        start_new_session=True, stdout=subprocess.PIPE,
    )
    rank.stdout.readline()
    pathlib.Path("rank").write_text(str(rank.pid))
    time.sleep(600)
if options.moe_a2a_compress == "lsh":
    stats = {"ratio_fp32": 5.0, "lsh": {"rate": 0.2}}
    perplexity *= 1.01 if options.seed == "1" else 1.03
print(f" iteration {options.train_iters}/ {options.train_iters} | lm loss: 4.5E+00 | ")
if "--moe-lsh-residual=identity" not in rest:
    for part in ("validation", "test"):
        print(
            f" validation loss at iteration {options.train_iters} on {part} set | "
            f"lm loss value: 3.5E+00 | lm loss PPL: {perplexity:.6E} | "
        )
pathlib.Path(options.moe_a2a_stats_json).write_text(json.dumps(stats))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the benchmark with the fake launcher; returns its exit status."""
    (tmp_path / "launch.py").write_text(LAUNCHER)
    monkeypatch.setattr(quality, "ROOT", tmp_path)
    monkeypatch.setattr(quality, "LAUNCHER", (sys.executable, str(tmp_path / "launch.py")))

    def run(*arguments):
        try:
            quality.main(["--results", str(tmp_path / "results"), *arguments])
        except SystemExit as stop:
            return stop.code
        return 0

    return run


def calls(tmp_path):
    return (tmp_path / "calls").read_text().splitlines()


def test_only_the_losses_of_the_last_iteration_count():
    losses = parse_losses(LOG, 600)
    assert losses == {"validation": (3.509986, 33.44779), "test": (3.427969, 30.814)}
    assert parse_losses(LOG, 60) == {}
    assert parse_losses(LOG, 300).keys() == {"validation"}


def test_the_curve_has_every_line_of_the_log():
    log = LOG.replace("     600 |", "      20 |") + "\n" + LOG
    assert parse_curve(log) == [(600, 3.324366), (600, 3.324366)]
    line = (
        " [2026] iteration     {}/     600 | samples: 8 | lm loss: {} | load_balancing_loss: 1.1 |"
    )
    assert parse_curve(f"{line.format(1, '6.9E+00')}\n{line.format(20, '6.1')}") == [
        (1, 6.9),
        (20, 6.1),
    ]


def test_settings_of_clustering_are_the_factors_in_all_combinations():
    assert METHODS["lsh-identity-warmup-refine"] == (
        "--moe-a2a-compress=lsh",
        "--moe-lsh-target-rate=0.20",
        "--moe-lsh-residual=identity",
        "--moe-lsh-warmup-iters=200",
        "--moe-lsh-refine=1",
    )
    assert len(WARMS_UP) == 5
    assert len(set(METHODS.values())) == len(METHODS)


def test_runs_and_table(run, tmp_path, capsys):
    assert run("--settings", "lsh-none,none", "--seeds", "1,2", "--iters", "20") == 0
    first = ["--seed=1 --train-iters=20", "--seed=1 --train-iters=20"]
    second = ["--seed=2 --train-iters=20", "--seed=2 --train-iters=20"]
    assert [" ".join(c.split()[:3:2]) for c in calls(tmp_path)] == first + second
    methods = ["none", "lsh", "none", "lsh"]
    assert [c.split()[4] for c in calls(tmp_path)] == [f"--moe-a2a-compress={m}" for m in methods]
    *_, sentence, _, _, _, none, ours, _ = capsys.readouterr().out.splitlines()
    assert sentence.startswith("Yardstick: 2 seeds of uncompressed training end 3.17% apart (")
    assert none == "| `none` | 1.00x | - | 31.50 (31.00 to 32.00) | 1 | 2 |"
    # exp(mean of log 1.01 and log 1.03); 12.7 standard errors each way.
    ratio = "1.0200 (0.9005 to 1.1553)"
    assert ours == f"| `lsh-none` | 5.00x | 0.200 | 32.13 (31.31 to 32.96) | {ratio} | 2 |"
    results = tmp_path / "results"
    assert "ranks 2 threads 1" in (results / "lsh-none-seed2.log").read_text()
    saved = json.loads((results / "lsh-none-seed2.json").read_text())
    assert saved.pop("seconds") > 0
    assert "--moe-lsh-residual=none" in saved.pop("flags")
    assert saved.pop("curve") == [[20, 4.5]]
    assert saved == {
        "setting": "lsh-none",
        "seed": 2,
        "validation_loss": 3.5,
        "validation_perplexity": 32.96,
        "test_loss": 3.5,
        "iterations": 20,
        "stats": {"ratio_fp32": 5.0, "lsh": {"rate": 0.2}},
    }
    assert {path.suffix for path in results.iterdir()} == {".json", ".log"}


def test_finished_runs_are_not_repeated(run, tmp_path, capsys):
    assert run("--settings", "none", "--seeds", "2") == 0
    assert run("--settings", "none,lsh-none", "--seeds", "1,2", "--table-only") == 0
    assert len(calls(tmp_path)) == 1
    assert "| `none` | 1.00x | - | 32.00 (32.00 to 32.00) |" in capsys.readouterr().out
    assert run("--settings", "none,lsh-none", "--seeds", "1,2") == 0
    assert len(calls(tmp_path)) == 4


def test_results_of_other_flags_are_refused(run, tmp_path):
    assert run("--settings", "none", "--seeds", "1", "--iters", "20") == 0
    message = run("--settings", "none", "--seeds", "1", "--iters", "30")
    assert "none-seed1.json" in message
    assert "--train-iters=20" in message
    assert len(calls(tmp_path)) == 1


def test_a_failed_run_is_reported_and_the_rest_goes_on(run, tmp_path, capsys):
    names = "none,lsh-none-center,lsh-identity,lsh-none"
    message = run("--settings", names, "--seeds", "1")
    assert "2 failed: lsh-none-center-seed1, lsh-identity-seed1" in message
    output = capsys.readouterr().out
    assert "FAILED, exit status 1:" in output
    assert "ValueError: no centre\n" in output
    assert "traceback" not in output
    assert "no losses of iteration 2000" in output
    assert "| `lsh-none` | 5.00x | 0.200 | 31.31 (31.31 to 31.31) |" in output
    assert not (tmp_path / "results" / "lsh-none-center-seed1.json").exists()
    assert "lsh-none-center-seed1" in run("--settings", "lsh-none-center", "--seeds", "1")
    assert len(calls(tmp_path)) == 5


def test_a_run_that_hangs_leaves_no_process(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "TIMEOUT_SECONDS", 3.0)
    assert "1 failed" in run("--settings", "none,lsh-none-random", "--seeds", "1")
    assert "lsh-none-random-seed1: FAILED, ended after 3 s" in capsys.readouterr().out
    rank = Path("/proc") / (tmp_path / "rank").read_text()
    for _ in range(100):
        if not rank.exists() or ") Z " in (rank / "stat").read_text():
            return
        time.sleep(0.1)
    pytest.fail(f"{rank} lives on")


def test_settings_go_on_from_one_checkpoint_of_their_seed(run, tmp_path):
    arguments = ["--settings", "none,lsh-none,lsh-none-warmup", "--seeds", "1", "--iters", "20"]
    assert run(*arguments, "--from-checkpoint", "100") == 0
    first, *others = calls(tmp_path)
    directory = tmp_path / "results" / "checkpoint-seed1"
    assert "--train-iters=100 " in first
    assert f"--save={directory} --save-interval=100" in first
    assert len(others) == 2
    for call in others:
        assert f"--load={directory}" in call
        assert "--save" not in call
        assert "--train-iters=120 " in call
    for call in (first, *others):
        assert "--min-lr=1e-4 --lr-decay-iters=100 " in call


def test_without_a_checkpoint_nothing_goes_on(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "LAUNCHER", (sys.executable, "-c", "raise SystemExit(1)"))
    message = run("--settings", "none", "--seeds", "1", "--from-checkpoint", "100")
    assert "2 failed: checkpoint-seed1, none-seed1" in message
    assert "no checkpoint to go on from" in capsys.readouterr().out


def test_further_flags_are_those_of_every_run(run, tmp_path):
    arguments = ["--settings", "none,lsh-none", "--seeds", "1", "--iters", "20"]
    assert run(*arguments, "--", "--lr=3e-4", "--hidden-size", "64") == 0
    assert all("--lr=3e-4 --hidden-size 64 --moe-a2a-compress" in c for c in calls(tmp_path))
    assert "with --seed=1" in run(*arguments)


def test_unknown_setting(run, capsys):
    assert run("--settings", "none,lsh-nine") == 2
    assert "lsh-nine: not one of none, identity," in capsys.readouterr().err
