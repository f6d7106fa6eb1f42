import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import namespaces
import network
from methods import METHODS
from namespaces import NetworkError, burst_bytes
from network_rows import make_row, shares_of_gain, table, warnings
from network_run import plan_visits
from rich.console import Console

ROOT = Path(__file__).parents[2]
TINY = """
    --data mock --hidden-size 64 --ffn-hidden-size 64 --num-layers 2 --seq-length 64
    --rates 40mbit,none --methods none,birdmoe,lsh --routing real --steps 2 --repeats 1 --settle 2
"""


def cannot_build_networks():
    try:
        namespaces.require()
    except NetworkError as error:
        return str(error)
    return None


@pytest.fixture
def networks():
    if reason := cannot_build_networks():
        pytest.skip(reason)


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "benchmarks/network.py"), *TINY.split(), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def left_by(pid):
    files = list(Path(tempfile.gettempdir()).glob(f"{namespaces.PREFIX}-{pid}-*"))
    return files + [name for name in namespaces._namespaces() if f"-{pid}-" in name]


@pytest.mark.usefixtures("networks")
def test_a_run_on_a_slow_network(tmp_path):
    path = tmp_path / "rows.json"
    process = start("--json", str(path))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-5000:]
    assert left_by(process.pid) == []
    rows = {(row["rate"], row["method"]): row for row in json.loads(path.read_text())}
    assert set(rows) == {(r, m) for r in ("40mbit", "none") for m in ("none", "birdmoe", "lsh")}
    for (rate, method), row in rows.items():
        assert row["ranks"] == 2
        assert row["model"]["tokens_per_rank_and_step"] == 2 * 8 * 64
        assert 0 <= row["protocol_overhead"] < 0.15, row
        assert row["other_bytes"] > 0
        assert row["interface_bytes"] > row["wire_bytes"]
        assert row["phases"]["transfer"] > 0
        assert row["phases"]["experts"] > 0
        assert row["phases"]["rest"] > 0
        assert (row["phases"]["encode"] > 0) == (method != "none")
        assert (row["phases"]["decode"] > 0) == (method != "none")
        assert (row["share_of_gain"] is None) == (rate == "none")
        assert (row["lsh_rate"] is None) == (method != "lsh")
        assert row["most_loaded_bytes"] > 0
    slow, free = rows["40mbit", "none"], rows["none", "none"]
    assert slow["step_ms"] > free["step_ms"]
    assert slow["ratio"] == slow["speedup"] == 1
    # Every wire of every layer and micro-batch at the rate of the link, less what bursts let pass.
    assert slow["phases"]["transfer"] > 0.7 * 1e3 * slow["wire_bytes"] / 2 / (40e6 / 8)
    assert rows["40mbit", "birdmoe"]["ratio"] > 4
    assert "40mbit" in output


@pytest.mark.usefixtures("networks")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(number):
    process = start()
    deadline = time.monotonic() + 60
    pids = []
    while len(pids) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
        # The network that shows that networks can be built is gone soon, with its names.
        done = subprocess.run(
            ["ip", "netns", "pids", f"{namespaces.PREFIX}-{process.pid}-1"],
            check=False,
            capture_output=True,
            text=True,
        )
        pids += [] if done.returncode else done.stdout.split()
    assert left_by(process.pid)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert left_by(process.pid) == []
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.usefixtures("networks")
def test_what_a_killed_run_left_is_removed():
    code = """
import os, subprocess, sys, tempfile
from namespaces import PREFIX, Network
network = Network(3).__enter__()
tempfile.mkdtemp(prefix=f"{PREFIX}-{os.getpid()}-")
command = ["ip", "netns", "exec", network.namespaces[0], "sleep", "600"]
print(subprocess.Popen(command, stdout=subprocess.DEVNULL).pid, flush=True)
os.kill(os.getpid(), 9)
"""
    with namespaces.Network(2) as of_a_living_process:
        killed = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT / "benchmarks",
            stdout=subprocess.PIPE,
            text=True,
        )
        sleeper, _ = killed.communicate(timeout=60)
        assert len(left_by(killed.pid)) == 5
        namespaces.remove_leftovers()
        assert left_by(killed.pid) == []
        status = Path(f"/proc/{sleeper.strip()}/stat")
        assert not status.exists() or ") Z " in status.read_text()
        assert set(of_a_living_process.namespaces) <= set(namespaces._namespaces())


def test_without_root(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit) as stop:
        network.main(["--data", "mock"])
    assert "need root" in stop.value.code
    assert "--unshaped" in stop.value.code


def test_without_iproute2(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NetworkError, match=r"`ip` was not found\. Install iproute2"):
        namespaces.require()


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    before = {number: signal.getsignal(number) for number in network.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rates", "200"], ("200: not a rate", "200mbit, or none")),
        (["--rates", "0mbit"], ("0mbit: not a rate",)),
        (["--unshaped", "--rates", "1gbit"], ("--rates=1gbit", "--rates=none")),
        (["--ranks", "2,3"], ("--ranks=3", "Use 2, 4 or 8")),
        (["--methods", "none,zip"], ("zip: not one of none,",)),
        (["--routing", "skewed"], ("skewed: not one of balanced, real",)),
        (["--steps", "0"], ("--steps=0",)),
        (["--hidden-size", "100"], ("--hidden-size=100", "multiple of 64")),
        (["--data", "nowhere/text"], ("nowhere/text_train.bin", "--data=mock")),
        (["--json", "nowhere/rows.json"], ("--json=nowhere/rows.json",)),
    ],
)
def test_refused_options(arguments, words, capsys):
    with pytest.raises(SystemExit):
        network.parse_options(arguments)
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


def test_none_is_always_compared_with():
    assert network.parse_options(["--methods", "lsh,bf16"]).methods == ["none", "lsh", "bf16"]
    assert network.parse_options(["--methods", "all"]).methods == list(METHODS)
    assert network.parse_options(["--unshaped"]).rates == ["none"]


def test_bursts():
    assert burst_bytes("10gbit") == 625_000
    assert burst_bytes("20mbit") == namespaces.MIN_BURST_BYTES


@given(
    rates=st.lists(st.sampled_from(("none", "1gbit", "20mbit")), min_size=1, unique=True),
    methods=st.lists(st.sampled_from(("lsh", "bf16", "fp8")), unique=True),
    repeats=st.integers(1, 4),
)
def test_a_plan_visits_everything_equally_often(rates, methods, repeats):
    methods = ["none", *methods]
    visits = plan_visits(rates, methods, steps=2, repeats=repeats, settle=5)
    warm_up, visits = visits[: len(methods)], visits[len(methods) :]
    assert [visit["method"] for visit in warm_up] == methods
    for repeat in range(repeats):
        of_repeat = [(v["rate"], v["method"]) for v in visits if v["repeat"] == repeat]
        assert set(of_repeat) == {(r, m) for r in rates for m in methods} | {("none", "none")}
        assert len(of_repeat) == len(set(of_repeat))
        assert of_repeat[0][0] == "none"
    if repeats == len(methods):
        first_of_rate = [v["method"] for v in visits if v["rate"] == rates[-1]][:: len(methods)]
        assert rates == ["none"] or set(first_of_rate) == set(methods)


def visit(repeat, rate, method, seconds, wire_bytes=1000.0, **changes):
    """A visit of two ranks and four experts; the second rank is the slower."""

    def step(rank, seconds, first):
        return {
            "seconds": seconds - 0.1 + 0.1 * rank,
            "phases": {"encode": 0.1, "transfer": 0.2, "decode": 0.0, "experts": 0.3},
            "counts": dict.fromkeys(("PASSES", "LOAD", "CENTROIDS", "CLUSTERED_ROWS"), 0.0)
            | {"RAW": 1000.0, "WIRE": wire_bytes},
            "interface_bytes": 1500,
            "layers_interface_bytes": 1050 if first else None,
            "tokens_per_expert": [[4, 2, 1, 1], [2, 2, 2, 2]],
        } | changes

    steps = [99.0, *seconds]
    ranks = [[step(rank, s, i == 0) for i, s in enumerate(steps)] for rank in range(2)]
    return {"repeat": repeat, "rate": rate, "method": method, "steps": 2, "ranks": ranks}


def test_a_row_of_hand_made_visits():
    visits = [
        visit(0, "none", "none", [1.0, 1.0]),
        visit(0, "1gbit", "none", [4.0, 6.0]),
        visit(0, "1gbit", "bf16", [2.0, 3.0], wire_bytes=500.0),
        visit(1, "none", "none", [2.0, 2.0]),
        visit(1, "1gbit", "none", [6.0, 6.0]),
        visit(1, "1gbit", "bf16", [3.0, 3.0], wire_bytes=500.0),
    ]
    row = make_row(visits, "1gbit", "bf16", hidden_size=8)
    assert row["step_ms_repeats"] == [2500, 3000]
    assert (row["step_ms_min"], row["step_ms"], row["step_ms_max"]) == (2000, 3000, 3000)
    # Paired by repeat: 5 / 2.5 and 6 / 3; (5 - 2.5) / (5 - 1) and (6 - 3) / (6 - 2).
    assert (row["speedup_min"], row["speedup"], row["speedup_max"]) == (2, 2, 2)
    assert row["share_of_gain"] == pytest.approx((0.625 + 0.75) / 2)
    assert (row["wire_bytes"], row["float32_bytes"], row["ratio"]) == (1000, 2000, 2)
    assert (row["interface_bytes"], row["a2a_interface_bytes"]) == (3000, 2100)
    assert row["other_bytes"] == 900
    assert row["protocol_overhead"] == pytest.approx(1.1)
    # Pairs of both ranks: 8, 4, 2, 2 and 4, 4, 4, 4.
    assert row["load_max_over_mean"] == {"experts": 1.5, "ranks": 1.25}
    # Sent to the other rank: 2 by the first and 6 by the second, then 4 by each; 4 wires, 8 values.
    assert row["most_loaded_bytes"] == (6 + 4) / 2 * 4 * 4 * 8
    milliseconds = {"encode": 100, "transfer": 200, "decode": 0, "experts": 300, "rest": 2100}
    assert row["phases"] == pytest.approx(milliseconds)
    assert "110.0%" in warnings([row])[0]
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(table([row | {"ranks": 2, "routing": "real"}]))
    assert "3000 (2000..3000)" in console.export_text()


def test_a_codec_tells_its_most_loaded_bytes():
    counts = {"PASSES": 8.0, "LOAD": 8 * 70.0, "CENTROIDS": 2.0, "CLUSTERED_ROWS": 8.0}
    changes = {"counts": counts | {"RAW": 4.0, "WIRE": 1.0}, "interface_bytes": 0}
    visits = [visit(0, "none", m, [1.0], **changes) for m in ("none", "lsh")]
    row = make_row(visits, "none", "lsh", hidden_size=8)
    assert row["most_loaded_bytes"] == 4 * 70
    assert row["lsh_rate"] == 0.25
    assert row["share_of_gain"] is None
    assert row["interface_bytes"] is row["protocol_overhead"] is None
    assert warnings([row]) == []


def test_no_share_of_no_gain():
    assert shares_of_gain([1.0], [2.0], [2.0]) is None
    assert shares_of_gain([1.0, 1.0, 9.0], [2.0, 3.0, 4.0], [2.0, 1.0, 3.0]) == (1 - 5) / 2
