"""The commands of README.md and docs/: run here, run by a named test, or checked word by word.

A block of bash without a mark is run. A comment before it says what else it needs, and which test
runs it; it is not seen on the page:

    <!-- needs: gpu -->
    <!-- needs: minutes; run by tests/test_scripts.py -->
"""

import argparse
import importlib.util
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

from tests.docs.documents import PAGES, ROOT, blocks
from tests.gloo import PROCESSES

NEEDS = {"gpu", "cluster", "docker", "data", "network", "root", "minutes"}
TIMEOUT_S = 120
BASH = [block for path in PAGES for block in blocks(path) if block.language == "bash"]
RUN = [block for block in BASH if block.needs is None]
MARKED = [block for block in BASH if block.needs is not None]
OURS = ("megatron_moe_comp", "benchmarks", "docs", "scripts", "configs", "tests")
name_of = lambda block: block.name  # noqa: E731


@pytest.fixture
def copy(tmp_path):
    """A directory that looks like the repository and may be written to."""
    for path in ROOT.iterdir():
        if path.name not in ("data", "runs", ".git"):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def run_python(words, directory):
    """Returns the exit status and output of `python WORDS`, run by a fork that has Megatron."""
    log = directory / "output.log"
    process = PROCESSES.Process(target=_be_python, args=(words, directory, log))
    process.start()
    process.join(TIMEOUT_S)
    process.kill()
    process.join()
    return process.exitcode, log.read_text()


def _be_python(words, directory, log):
    with log.open("w") as stream:
        os.dup2(stream.fileno(), sys.stdout.fileno())
        os.dup2(stream.fileno(), sys.stderr.fileno())
    os.chdir(directory)
    multiprocessing.set_start_method("fork", force=True)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, os.path.dirname(words[0]))
        runpy.run_path(words[0], run_name="__main__")


@pytest.mark.parametrize("block", RUN, ids=name_of)
def test_a_command_without_a_mark_works(block, copy):
    """The shell expands the words of each python; all else it runs itself."""
    words = copy / "words"
    words.touch()
    shell = f'python() {{ printf "%s\\0" "$@" >> {words}; echo >> {words}; }}\n{block.code}'
    subprocess.run(["bash", "-euo", "pipefail", "-c", shell], check=True, cwd=copy)
    commands = [line.split("\0")[:-1] for line in words.read_text().splitlines()]
    assert commands
    for command in commands:
        status, output = run_python(command, copy)
        assert status == 0, output[-3000:]


@pytest.mark.parametrize("block", MARKED, ids=name_of)
def test_a_mark_says_why_and_names_a_test_that_runs_it(block):
    assert set(block.needs.split(", ")) <= NEEDS
    assert block.test or block.needs != "minutes", "which test runs it?"
    if block.test:
        file, _, function = block.test.partition("::")
        text = (ROOT / file).read_text()
        assert not function or f"def {function}(" in text, block.test
        stems = [Path(w).stem for words in block.commands() for w in words if "/" in w or "." in w]
        assert any(re.search(rf"\b{stem}\b", text) for stem in stems), f"none of {stems}"


@pytest.mark.parametrize("block", BASH, ids=name_of)
def test_scripts_modules_and_flags_exist(block):
    for words in block.commands():
        for word in words:
            path = word.rstrip(")")
            if path.split("/")[0] in OURS and "/" in path:
                for file in expanded(path):
                    assert (ROOT / file).exists(), file
        name, rest = program(words)
        if name is not None and name.split(".")[0] in OURS:
            assert importlib.util.find_spec(name), name
        flags = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
        if known := known_flags(name):
            assert flags <= known, flags - known


def expanded(path):
    """The words that the shell makes of one with braces."""
    braces = re.fullmatch(r"(.*)\{(.*)\}(.*)", path)
    if braces is None:
        return [path]
    before, choices, after = braces.groups()
    return [before + choice + after for choice in choices.split(",")]


def program(words):
    """The script or module that is given flags, and what comes after it."""
    for i, word in enumerate(words):
        if (i and words[i - 1] == "-m") or word.endswith((".py", ".sbatch", "run_local.sh")):
            return word, words[i + 1 :]
    return None, []


def known_flags(name):
    """The flags of a program; nothing where it has none or is not ours."""
    if name is None:
        return set()
    if name.endswith((".sbatch", "run_local.sh", "gpt_moe.py", "t5_moe.py", ".run")):
        return entry_flags()
    if name.startswith("megatron_moe_comp."):
        return help_flags("-m", name) | (entry_flags() if name.endswith(".plan") else set())
    return help_flags(name) if name.startswith(("benchmarks/", "docs/")) else set()


@cache
def entry_flags():
    """Every flag of the entry scripts."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_moe_comp.training import arguments, dry_run

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    arguments.with_our_flags(arguments.add_t5_args, dry_run.add_dry_run_args)(parser)
    return set(parser._option_string_actions)


@cache
def help_flags(*words):
    """The flags that --help of a module or script names."""
    with tempfile.TemporaryDirectory() as directory:
        words = [str(ROOT / word) if word.endswith(".py") else word for word in words]
        status, output = run_python([*words, "--help"], Path(directory))
    assert status == 0, output
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", output))


def test_no_command_is_indented():
    """An indented block has no language, and no mark."""
    starts = ("bash ", "python ", "torchrun ", "sbatch ", "pip ", "git ")
    for path in PAGES:
        text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        for line in text.splitlines():
            assert not line.startswith(tuple(f"    {start}" for start in starts)), (path, line)
