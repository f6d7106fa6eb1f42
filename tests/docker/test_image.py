"""The Dockerfile is clean, and its steps that need no container engine do what they should."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NGC_TORCH = "2.12.0a0+0291f960b6.nv26.04.48445190"


def run(*command, **variables):
    return subprocess.run(
        list(map(str, command)),
        check=False,
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )


def test_hadolint_finds_nothing_and_every_exception_says_why():
    done = run(Path(sys.executable).parent / "hadolint", "--no-color", ROOT / "Dockerfile")
    assert not done.returncode, done.stdout + done.stderr
    lines = DOCKERFILE.splitlines()
    for before, line in itertools.pairwise(lines):
        if "hadolint" in line:
            assert re.fullmatch(r"# .*[a-z]\.", before), line


def test_bases_are_pinned():
    bases = dict(re.findall(r"^ARG (\w+_BASE)=(\S+)$", DOCKERFILE, flags=re.MULTILINE))
    assert re.fullmatch(
        r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3@sha256:[0-9a-f]{64}", bases["GPU_BASE"]
    )
    assert re.fullmatch(r"python:3\.12\.\d+-slim-\w+", bases["CPU_BASE"])
    document = (ROOT / "docs/containers.md").read_text()
    for base in bases.values():
        assert f"`{base.partition('@')[0]}`" in document


def test_the_torch_of_the_base_satisfies_the_requirement():
    torch_requirement = next(
        found for found in map(Requirement, PROJECT["dependencies"]) if found.name == "torch"
    )
    assert torch_requirement.specifier.contains(NGC_TORCH, prereleases=True)
    assert not torch_requirement.specifier.contains("2.11.0a0+a6c236b9fd.nv26.03", prereleases=True)


def test_defaults_and_labels_are_those_of_the_package():
    assert f"ARG VERSION={PROJECT['version']}\n" in DOCKERFILE
    assert f'image.licenses="{PROJECT["license"]}"' in DOCKERFILE
    assert f'image.description="{PROJECT["description"]}"' in DOCKERFILE
    architectures = re.search(
        r'^CUDA_ARCHITECTURES = (".*")$', (ROOT / "setup.py").read_text(), re.M
    )
    assert f"ARG CUDA_ARCHITECTURES={architectures[1]}\n" in DOCKERFILE


def test_the_image_does_not_run_as_root():
    for stage in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:3]:
        instructions = re.findall(r"^(USER|RUN) (.*)$", stage, flags=re.MULTILINE)
        assert instructions[-2] == ("USER", "10001")
        assert "scripts/setup.sh" in instructions[-1][1]
    assert "USER" not in DOCKERFILE.rpartition("\nFROM ")[2]


def ignored(path):
    """Whether .dockerignore leaves a path out; a pattern without ** starts at the root."""
    found = False
    for pattern in (ROOT / ".dockerignore").read_text().splitlines():
        if pattern and not pattern.startswith("#"):
            expression = re.escape(pattern).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
            found |= bool(re.fullmatch(f"{expression}(/.*)?", path))
    return found


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_the_build_context_has_what_git_has_and_nothing_that_is_built():
    paths = run("git", "ls-files").stdout.split()
    assert "Dockerfile" in paths
    assert [path for path in paths if ignored(path)] == []
    assert not ignored("megatron_moe_comp/data/prepare.py")
    for path in (".git/config", ".venv/bin/python", "data/stdlib.bin", "a/__pycache__/b.pyc"):
        assert ignored(path), path
    assert ignored("megatron_moe_comp/_kernels_cpu.cpython-312-x86_64-linux-gnu.so")


def test_the_health_check_lists_every_op():
    command = json.loads(re.search(r"^HEALTHCHECK .*CMD (\[.*\])$", DOCKERFILE, re.M)[1])
    assert command.pop(0) == "python"
    assert command.pop(0) == "-P"
    done = run(sys.executable, *command)
    assert not done.returncode, done.stdout + done.stderr
    _, *rows = [line.split() for line in done.stdout.splitlines()]
    assert {"quantize_pack", "cluster_sum", "allocate_bits"} <= {op for op, _, _ in rows}
    assert {cpu for _, cpu, _ in rows} == {"compiled"}


def test_missing_cuda_kernels_end_the_build(tmp_path):
    package = tmp_path / "megatron_moe_comp"
    shutil.copytree(ROOT / "megatron_moe_comp/ops", package / "ops")
    shutil.copy(ROOT / "megatron_moe_comp/__init__.py", package)
    # Without site: the finder of an editable install would find the kernels of that.
    command = (sys.executable, "-S", "-P", "-m", "megatron_moe_comp.ops", "--require", "cuda")
    done = run(*command, PYTHONPATH=f"{tmp_path}:{sysconfig.get_path('purelib')}")
    assert done.returncode == 1
    assert "No kernel is compiled for cuda" in done.stderr
    assert "compiled" not in done.stdout


def test_kept_packages_and_constraints():
    kept = run(sys.executable, "scripts/base_packages.py").stdout.splitlines()
    names = [line.partition("==")[0] for line in kept]
    assert names == sorted(names)
    assert "numpy" in names
    assert f"torch=={torch.__version__.partition('+')[0]}" in "\n".join(kept)
    constraints = run(sys.executable, "scripts/base_packages.py", "constraints.txt").stdout
    assert constraints.startswith("\n".join(kept))
    assert not re.search("^pytest==", constraints, flags=re.MULTILINE)  # installed, free to change
    bare = run(sys.executable, "-I", "-S", "scripts/base_packages.py", "constraints.txt").stdout
    assert bare == (ROOT / "constraints.txt").read_text()


def test_a_replaced_torch_ends_the_build(tmp_path):
    kept = tmp_path / "kept.txt"
    found = run(sys.executable, "scripts/base_packages.py").stdout
    check = ("bash", "docker/check_gpu.sh", sys.executable, kept)
    kept.write_text(re.sub("torch==.*", f"torch=={NGC_TORCH}  # /usr/lib", found))
    done = run(*check)
    assert done.returncode == 1
    assert f"were replaced: torch=={NGC_TORCH}" in done.stderr
    kept.write_text(re.sub("torch==.*\n", "", found))
    assert "The base image has no torch" in run(*check).stderr


def test_unchanged_packages_and_compiled_kernels_pass(tmp_path):
    if not list((ROOT / "megatron_moe_comp").glob("_kernels_cuda*.so")):
        pytest.skip("the CUDA kernels are not built here")
    kept = tmp_path / "kept.txt"
    kept.write_text(run(sys.executable, "scripts/base_packages.py").stdout)
    done = run("bash", "docker/check_gpu.sh", sys.executable, kept)
    assert not done.returncode, done.stderr
    assert re.search("^quantize_pack +compiled +compiled$", done.stdout, flags=re.MULTILINE)


@pytest.mark.parametrize("there", [(), ("apex",), ("apex", "transformer_engine")])
def test_transformer_engine_and_apex_are_installed_where_they_lack(tmp_path, there):
    for name in there:
        (tmp_path / name).mkdir()
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\n[[ $1 == -c ]] && exec {sys.executable} -S "$@"\necho "$*"\n')
    python.chmod(0o755)
    done = run("bash", "docker/te_apex.sh", python, PYTHONPATH=str(tmp_path))
    assert not done.returncode, done.stderr
    installed = done.stdout.splitlines()
    assert len(installed) == 2 - len(there)
    assert all(line.startswith("-m pip install --no-build-isolation ") for line in installed)
    assert ("transformer-engine" in done.stdout) == ("transformer_engine" not in there)
    assert ("NVIDIA/apex" in done.stdout) == ("apex" not in there)


def test_torchrun_starts_the_python_beside_it(tmp_path):
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "torchrun").symlink_to(ROOT / "docker/torchrun")
    done = run("torchrun", "--help", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.stdout == "-m torch.distributed.run --help\n"
