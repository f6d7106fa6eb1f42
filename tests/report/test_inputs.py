"""Reading result files, and what is said of those that cannot be used."""

import json
import subprocess
import sys

import pytest

from megatron_moe_comp.report.__main__ import main
from megatron_moe_comp.report.inputs import InputError, read_results
from tests.report.samples import network_rows, quality_runs, statistics, write_samples


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_any_mix_of_files_and_directories(tmp_path):
    write_samples(tmp_path / "mix")
    results = read_results([tmp_path / "mix/a2a.json", tmp_path / "mix"])
    counts = (len(results.network), len(results.quality), len(results.statistics))
    assert counts == (len(network_rows()), len(quality_runs()), 1)
    assert results.statistics[0][0] == "a2a"
    source = next(s for s in results.sources if s.kind == "network")
    assert (source.entries, source.dates) == (len(network_rows()), ("2026-11-22",))
    assert source.versions == (
        "torch 2.13.0, megatron-core 0.19.2",
        "num_layers 4, hidden_size 512",
        "2 x sample",
    )


FOREIGN = {
    "text": "not JSON",
    "empty list": [],
    "numbers": [1, 2],
    "other object": {"loss": 1.0},
    "row without step time": [{k: v for k, v in network_rows()[0].items() if k != "step_ms"}],
    "run whose seed is text": quality_runs(seeds=("1",))[0],
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_is_named_with_a_remedy(tmp_path, content):
    path = write(tmp_path / "foreign.json", content)
    output = tmp_path / "report.html"
    with pytest.raises(SystemExit) as stopped:
        main([str(path), "-o", str(output)])
    message = stopped.value.code
    assert str(path) in message
    assert "expected was" in message.lower()
    assert "again" in message or "leave this file out" in message
    assert not output.exists()


def test_missing_files_empty_directories_and_unwritable_output(tmp_path):
    with pytest.raises(InputError, match=r"absent\.json: no such file"):
        read_results([tmp_path / "absent.json"])
    with pytest.raises(InputError, match=r"holds no \.json file"):
        read_results([tmp_path])
    path = write(tmp_path / "a2a.json", statistics("birdmoe", 5.2))
    with pytest.raises(SystemExit, match="No such file"):
        main([str(path), "-o", str(tmp_path / "absent" / "report.html")])


def test_a_result_that_two_files_claim_is_refused(tmp_path):
    first, second = (write(tmp_path / f"{n}.json", quality_runs(seeds=(1,))) for n in "ab")
    with pytest.raises(InputError) as refused:
        read_results([first, second])
    for part in (str(first), str(second), "none, 1"):
        assert part in str(refused.value)


def test_without_matplotlib_the_command_says_what_to_install():
    code = (
        "import runpy, sys; sys.modules['matplotlib'] = None; sys.argv = ['report', 'x.json']; "
        "runpy.run_module('megatron_moe_comp.report', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "pip install -c constraints.txt matplotlib" in done.stderr
    assert "Traceback" not in done.stderr
