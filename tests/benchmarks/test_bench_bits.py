import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import bench_bits


def test_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_bits, "REPEATS", 1)
    path = tmp_path / "rows.json"
    bench_bits.main(["--ranks", "6", "--bits", "6", "--json", str(path)])
    rows = json.loads(path.read_text())
    assert len(rows) == 3 * 2 * 3
    hot = {(r["min"], r["policy"]): r for r in rows if r["load"] == "one rank 4x"}
    assert hot[3, "uniform"]["cut (%)"] == 0
    assert hot[3, "optimal"]["cut (%)"] >= 35
    assert hot[2, "optimal"]["cut (%)"] > hot[3, "optimal"]["cut (%)"]
    assert hot[2, "optimal"]["variance"] > hot[3, "optimal"]["variance"]
    assert "Bit policies" in capsys.readouterr().out


def test_too_few_ranks(capsys):
    with pytest.raises(SystemExit):
        bench_bits.main(["--ranks", "2"])
    assert "--ranks=2" in capsys.readouterr().err
