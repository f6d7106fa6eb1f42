import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import plan_accuracy
from plan_fit import Fitted, setting_of

from megatron_moe_comp.plan.cost_model import CodecSpeed, predict

TRUTH = Fitted(8e10, 6e9, 0.95, 1.5e9, 3e-4, 5e-3, 1.8)
CODECS = {"rq": CodecSpeed(1.5e9, 3e9), "mxfp8": CodecSpeed(1.5e8, 2e8)}
METHODS = ("none", "mxfp8", "birdmoe-8", "birdmoe-6", "lsh-20")
SIZES = {
    "num_layers": 4,
    "seq_length": 256,
    "ffn_hidden_size": 512,
    "num_experts": 8,
    "top_k": 2,
    "micro_batch_size": 8,
    "num_microbatches": 2,
    "vocabulary": 8192,
}


def row_of(rate, method, hidden, ranks, noise):
    """A row as the cost model itself predicts it, times something near 1."""
    row = {
        "rate": rate,
        "ranks": ranks,
        "method": method,
        "routing": "balanced",
        "model": SIZES | {"hidden_size": hidden},
        "load_max_over_mean": {"ranks": 1.02, "experts": 1.1},
        "lsh_rate": 0.21 if method == "lsh-20" else None,
        "cpu": "2 x Some CPU",
    }
    s = setting_of(row)
    found = predict(s.model, s.layout, s.machine(TRUTH, CODECS), s.method)
    stock = s.seconds(s.stock, TRUTH, CODECS)
    step = s.seconds(s.method, TRUTH, CODECS) * noise
    phases = {"encode": 0.0, "decode": 0.0}
    if s.config.forward.codec in CODECS:
        speed, wires = CODECS[s.config.forward.codec], s.method.traffic[0].wires
        values = 4 * 2 * sum(min(w.encoded, w.decoded) for w in wires) / s.core_share
        phases = {"encode": 1e3 * values / speed.encode, "decode": 1e3 * values / speed.decode}
    return row | {
        "step_ms": 1e3 * step,
        "speedup": stock / step,
        "wire_bytes": found.wire_bytes * ranks,
        "phases": phases,
    }


def rows(spread=0.0):
    random.seed(0)
    return [
        row_of(rate, method, hidden, ranks, 1 + random.uniform(-spread, spread))
        for rate, ranks in (("200mbit", 2), ("500mbit", 2), ("1gbit", 4), ("none", 2))
        for method in METHODS
        for hidden in (384, 512)
    ]


def run(tmp_path, found, *options):
    path, result = tmp_path / "rows.json", tmp_path / "errors.json"
    path.write_text(json.dumps(found))
    plan_accuracy.main([str(path), *options, "--json", str(result)])
    return json.loads(result.read_text())


HELD_OUT = ("--held-out-rate", "500mbit", "--held-out-hidden", "384")


def test_a_machine_that_is_as_modelled_is_found(tmp_path, capsys):
    report = run(tmp_path, rows(), *HELD_OUT)
    for name in ("flops", "link_efficiency", "stock_transfer"):
        assert report["fitted"][name] == pytest.approx(getattr(TRUTH, name), rel=0.1)
    for name, speed in CODECS.items():
        assert report["codecs"][name]["encode"] == pytest.approx(speed.encode, rel=0.05)
    assert report["errors"]["held_out"]["largest"] < 0.03
    for row in report["rows"]:
        assert row["held_out"] == (row["rate"] == "500mbit" or row["hidden_size"] == 384)
        assert row["predicted_bytes"] == row["measured_bytes"]
    assert "held out: median error" in capsys.readouterr().out


def test_noise_does_not_spoil_it(tmp_path):
    report = run(tmp_path, rows(spread=0.05), *HELD_OUT)
    assert report["errors"]["held_out"]["largest"] < 0.12


def test_a_wrong_prediction_shows(tmp_path):
    found = rows()
    wrong = next(r for r in found if r["rate"] == "500mbit" and r["method"] == "birdmoe-6")
    wrong["speedup"] *= 2
    report = run(tmp_path, found, *HELD_OUT)
    assert report["errors"]["held_out"]["largest"] == pytest.approx(0.5, abs=0.03)
    assert report["errors"]["fitted"]["largest"] < 0.03


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--held-out-rate", "3gbit"), "no row has what is to be held out"),
        (("--held-out-hidden", "384", "--held-out-hidden", "512"), "no row is left"),
    ],
)
def test_nothing_to_hold_out_or_to_fit(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        run(tmp_path, rows(), *options)
    assert message in capsys.readouterr().err
