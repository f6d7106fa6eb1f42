"""What `python -m megatron_moe_comp.watch` draws of a training."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from megatron_moe_comp import watch
from megatron_moe_comp.compression.wires import WIRES
from megatron_moe_comp.stats.comm_stats import RANK_LOADS

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def record(iteration, loss=4.0, **changes):
    wire = {"raw_bytes": 8e6, "wire_bytes": 2e6, "sqnr_db": 28.5}
    return {
        "time": (NOW - timedelta(seconds=30)).isoformat(),
        "setting": "birdmoe 6 bit",
        "ranks": 4,
        "iteration": iteration,
        "train_iters": 100,
        "seconds_per_iteration": 1.5,
        "loss": loss,
        "raw_bytes": 32e6,
        "wire_bytes": 8e6,
        "ratio_fp32": 4.0,
        "phase_seconds": {"encode": 0.1, "transfer": 0.75, "decode": 0.0, "experts": 0.3},
        "mean_bits": 5.5,
        "rows_of_bits": {"5": 10, "6": 30},
        "most_loaded_rank": dict(zip(RANK_LOADS, (4000.0, 2000.0, 1000.0), strict=True)),
        "most_loaded_node": None,
        "lsh": {"rows": 40, "rate": 0.2},
        "wires": dict.fromkeys(WIRES, wire),
    } | changes


def drawn(*records, now=NOW):
    console = Console(width=120, record=True, file=None)
    with console.capture() as capture:
        console.print(watch.view(records, now))
    return capture.get()


def test_the_latest_record_is_drawn():
    text = drawn(record(10, 5.0), record(20, 4.5), record(60, 4.0))
    assert "birdmoe 6 bit, 4 ranks   iteration 60 of 100   1.50 s each   0:01:00 left" in text
    assert "loss 4.0000  █▅▁" in text
    assert "8.000" in text
    assert "4.00x" in text
    assert "28.5" in text
    assert [line.split()[:2] for line in text.splitlines() if line.startswith("transfer")] == [
        ["transfer", "750.0"]
    ]
    assert "5: 25%  6: 75%   mean 5.50" in text
    assert "most loaded rank  1.0 kB" in text
    assert "most loaded node" not in text
    assert "0.200 centroids per row" in text
    assert "No line for" not in text


def test_the_length_of_a_bar_is_the_share_of_an_iteration():
    bars = {}
    for line in drawn(record(10)).splitlines():
        for phase in ("encode", "transfer", "decode", "experts"):
            if line.startswith(phase):
                bars[phase] = line.count("━")
    assert (bars["transfer"], bars["decode"]) == (20, 0)
    assert 0 < bars["encode"] < bars["experts"] < bars["transfer"]


def test_little_is_known_at_first():
    assert "No log interval" in drawn()
    text = drawn(record(10, None, seconds_per_iteration=None, phase_seconds=None, lsh=None))
    assert "loss" not in text
    assert "left" not in text
    assert "phase" not in text
    assert "Nothing crossed a wire." in drawn(record(10, ratio_fp32=None))


def test_a_silent_run_is_said_to_be_silent():
    records = record(10), record(20)
    assert "No line for" not in drawn(*records, now=NOW + timedelta(seconds=10))
    assert "No line for 0:01:30." in drawn(*records, now=NOW + timedelta(seconds=60))
    ended = drawn(record(10), record(20, ended=True), now=NOW + timedelta(days=1))
    assert "No line for" not in ended
    assert "Ended." in ended


@pytest.fixture
def path(tmp_path):
    def write(*records, tail=""):
        file = tmp_path / "a2a.jsonl"
        file.write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
        return file

    return write


def test_what_was_repeated_after_a_stop_counts_once(path):
    file = path(record(10), record(20, 9.0), record(30), record(20, 8.0), tail='{"iter')
    assert [(r["iteration"], r["loss"]) for r in watch.read_records(file)] == [(10, 4.0), (20, 8.0)]


def test_it_ends_with_the_training(path, capsys):
    watch.main([str(path(record(50), record(90, ended=True)))])
    assert "iteration 90 of 100" in capsys.readouterr().out


@pytest.mark.parametrize("whole", [True, False])
def test_once(path, capsys, whole):
    file = path(record(50))
    watch.main(["--once", str(file if whole else file.parent)])
    assert "iteration 50 of 100" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["no JSON", "[1]", "{}"])
def test_foreign_files_are_refused(path, line):
    with pytest.raises(SystemExit, match=r"a2a.jsonl: holds no record .*--moe-a2a-stats-jsonl"):
        watch.main(["--once", str(path(tail=line + "\n"))])


def test_a_line_that_was_cut_off_is_left_out(path):
    file = path(record(10), tail='{"iter\n' + json.dumps(record(20)) + "\n")
    assert [r["iteration"] for r in watch.read_records(file)] == [10, 20]


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"cannot be read \(No such file.*--moe-a2a-stats-jsonl"):
        watch.main([str(tmp_path / "none.jsonl")])
