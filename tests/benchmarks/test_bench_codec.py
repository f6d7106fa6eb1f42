"""The benchmark's options, rows and what it refuses; never its figures."""

import json
import sys
from pathlib import Path

import pytest
import torch

from megatron_moe_comp import ops

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import bench_codec

KEYS = ["codec", "bits", "dtype", "bytes", "threads", "impl"]
KEYS += ["encode_gbs", "decode_gbs", "memcpy_gbs"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(bench_codec, "MIN_REPEATS", 1)
    monkeypatch.setattr(bench_codec, "MIN_SECONDS", 0.0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(tmp_path, options):
    path = tmp_path / "rows.json"
    bench_codec.main([*options.split(), "--json", str(path)])
    return json.loads(path.read_text())


def test_every_codec_has_a_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ops, "is_compiled", lambda *_: True)
    rows = run(tmp_path, "--sizes 1 --hidden 64 --bits 3,4 --dtypes float32,bfloat16")
    assert {row["codec"] for row in rows} == set(bench_codec.CODECS) - {"identity"}
    assert {row["bits"] for row in rows if row["codec"] == "rq"} == {3, 4}
    assert {row["bits"] for row in rows if row["codec"] == "fp8"} == {None}
    for row in rows:
        assert list(row) == KEYS
        assert row["bytes"] == 1 << 20
        assert min(row[key] for key in KEYS if key.endswith("gbs")) > 0
    assert "share of memcpy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("codec", "op", "name"),
    [("rq", "quantize_pack", "_reference"), ("fp8", "cast_pack", "_unpack_reference")],
)
def test_the_reference_is_measured_when_asked_for(tmp_path, monkeypatch, codec, op, name):
    called = []
    module = sys.modules[f"megatron_moe_comp.ops.{op}"]
    reference = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: (called.append(1), reference(*args))[0])
    (row,) = run(tmp_path, f"--sizes 1 --hidden 64 --codecs {codec} --impl reference")
    assert row["impl"] == "reference"
    assert called


@pytest.mark.parametrize("codec", ["dithered", "gaussian"])
def test_every_reference_can_be_measured(tmp_path, codec):
    (row,) = run(tmp_path, f"--sizes 1 --hidden 64 --codecs {codec} --impl reference")
    assert row["impl"] == "reference"


@pytest.mark.parametrize("codec", ["rq", "dithered", "gaussian", "mxfp8"])
def test_the_reference_is_not_measured_by_accident(tmp_path, monkeypatch, codec):
    monkeypatch.setattr(ops, "is_compiled", lambda *_: False)
    with pytest.raises(SystemExit, match=r"--impl=compiled: .*not built"):
        run(tmp_path, f"--sizes 1 --codecs {codec}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"--device=cuda: no GPU is visible"):
        run(tmp_path, "--sizes 1 --codecs rq --device cuda")


def test_an_unknown_codec_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "--codecs zip")
    assert "not one of identity, rq" in capsys.readouterr().err
