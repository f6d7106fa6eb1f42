"""README's tables are what the committed results give."""

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import readme_tables

from tests.report.samples import network_rows, quality_runs

TEXT = "before\n<!-- table: {} -->\nstale\n<!-- end -->\nafter\n"


@pytest.fixture
def repository(tmp_path):
    """A README and results; returns what main() makes of a marked table."""
    (tmp_path / "results/gpt").mkdir(parents=True)
    rows = network_rows(routings=("balanced", "real"))
    (tmp_path / "results/network.json").write_text(json.dumps(rows))
    for run in quality_runs(seeds=(1, 2)):
        path = tmp_path / f"results/gpt/{run['setting']}-{run['seed']}.json"
        path.write_text(json.dumps(run))
    readme = tmp_path / "README.md"
    arguments = ["--readme", str(readme), "--results", str(tmp_path / "results")]

    def fill(words):
        readme.write_text(TEXT.format(words))
        readme_tables.main(arguments)
        readme_tables.main([*arguments, "--check"])
        before, after = TEXT.format(words).split("stale\n")
        made = readme.read_text()
        assert made.startswith(before)
        assert made.endswith(after)
        return made.removeprefix(before).removesuffix(after).splitlines()

    fill.readme, fill.arguments = readme, arguments
    return fill


def test_documents_are_up_to_date():
    readme_tables.main(["--check"])
    for document, kind in (("README.md", "network"), ("docs/tuning.md", "plan")):
        assert f"<!-- table: {kind}" in (readme_tables.ROOT / document).read_text()


def test_network(repository):
    header, _, limit, *lines = repository("network 1gbit 200mbit balanced")
    assert header == (
        "| method | 200 Mbit/s, 2 ranks | 200 Mbit/s, 4 ranks | 1 Gbit/s, 2 ranks "
        "| 1 Gbit/s, 4 ranks |"
    )
    assert limit.startswith("| limit | 3.66 | 8.97 |")
    assert len(lines) == 5
    row = next(r for r in network_rows() if r["method"] == "birdmoe" and r["ranks"] == 4)
    assert row["rate"] == "200mbit"
    line = next(line for line in lines if line.startswith("| `birdmoe` |"))
    assert line.split(" | ")[2] == (
        f"{row['speedup']:.2f} ({row['speedup_min']:.2f} to {row['speedup_max']:.2f}), "
        f"{100 * row['share_of_gain']:.0f}%"
    )


def test_network_over_another_method(repository):
    header, _, limit, *lines = repository("network 200mbit balanced over-bf16")
    by_key = {(r["rate"], r["ranks"], r["method"]): r for r in network_rows()}
    bf16, ours = (by_key["200mbit", 2, name] for name in ("bf16", "birdmoe"))
    free = by_key["none", 2, "none"]
    assert limit.split(" | ")[1] == f"{bf16['step_ms'] / free['step_ms']:.2f}"
    assert not any(line.startswith(("| `bf16` |", "| `none` |")) for line in lines)
    pairs = zip(bf16["step_ms_repeats"], ours["step_ms_repeats"], strict=True)
    low, middle, high = sorted(slow / fast for slow, fast in pairs)
    line = next(line for line in lines if line.startswith("| `birdmoe` |"))
    assert line.split(" | ")[1] == f"{middle:.2f} ({low:.2f} to {high:.2f})"
    assert header.count("200 Mbit/s") == 2


def test_network_of_several_routings_names_them(repository):
    header = repository("network 1gbit")[0]
    assert "| 1 Gbit/s, 2 ranks, balanced routing |" in header
    assert "| 1 Gbit/s, 4 ranks, real routing |" in header
    assert len(repository("network")[0].split("|")) == 3 + 3 * 2 * 2


def test_quality(repository):
    header, _, none, *lines = repository("quality gpt")
    assert header == (
        "| setting | ratio of bytes | centroids per row | perplexity, mean (min to max) "
        "| ratio to none (95% interval) | seeds |"
    )
    assert none.startswith("| `none` | 1.00x | - |")
    assert none.endswith("| 1 | 2 |")
    assert [line.split("`")[1] for line in lines] == [
        "bf16",
        "mxfp8",
        "lsh-20",
        "birdmoe",
        "birdmoe-4",
    ]
    assert all(line.count(" to ") == 2 for line in lines)


def test_plan(repository):
    header, _, *lines = repository("plan speedup")
    assert "Qwen3-30B-A3B" in header
    speedups = [float(re.search(r"([\d.]+)x", line)[1]) for line in lines]
    assert sorted(speedups, reverse=True) == speedups
    header, _, *lines = repository("plan break-even")
    assert header.endswith("| 1.5x | 2x |")
    limits = [float(limit) for limit in re.findall(r"(\d+) Gbit/s", lines[0])]
    assert sorted(limits, reverse=True) == limits


def test_without_results_there_is_no_table(repository):
    assert repository("quality t5") == []
    assert repository("network 5gbit") == []


def test_check_says_what_to_run_and_writes_nothing(repository):
    repository.readme.write_text(TEXT.format("quality gpt"))
    with pytest.raises(SystemExit, match=r"benchmarks/readme_tables\.py"):
        readme_tables.main([*repository.arguments, "--check"])
    assert "stale" in repository.readme.read_text()


def test_an_unknown_table_is_named(repository):
    with pytest.raises(SystemExit, match=r"table: speed: expected network or quality or plan"):
        repository("speed")
    with pytest.raises(SystemExit, match=r"table: plan all: expected break-even or speedup"):
        repository("plan all")
