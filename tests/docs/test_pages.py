"""What the pages of the documentation name is there: files and flags."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from megatron_moe_comp.options.config import CompressionConfig

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = ("how-it-works", "tuning", "reproducing", "faq")
FILE = r"`((?:[\w.-]+/)*[\w-]+\.(?:py|md|args|json|sh|sbatch|svg))`"
RESULTS = ROOT / "benchmarks/results"
OURS = re.compile(r"--moe-(?:a2a|lsh)-[a-z0-9-]+")


def text_of(page):
    return (DOCS / f"{page}.md").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    tests = ROOT / "tests/end_to_end"
    homes = (ROOT, ROOT / "megatron_moe_comp", RESULTS, ROOT / "configs", tests)
    written = ("report.html", "runs/reproduced/README.md")
    for name in set(re.findall(FILE, text_of(page))) - set(written):
        assert any((home / name).exists() for home in homes), name


@pytest.mark.parametrize("page", PAGES)
def test_our_flags_exist(page):
    flags = {"--" + field.name.replace("_", "-") for field in fields(CompressionConfig)}
    assert set(OURS.findall(text_of(page))) <= flags
