"""The shell scripts: what a person with a bare machine meets first."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = ("bash", "cat", "sha256sum", "dirname", "flock", "env", "grep", "mkdir", "cp", "rm")


def run(command, timeout=300, **kwargs):
    return subprocess.run(
        command,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        **kwargs,
    )


@pytest.fixture
def copy(tmp_path):
    """The repository's setup files, without .venv, and a PATH without Python or a real compiler."""
    for name in ("pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in TOOLS:
        (tools / tool).symlink_to(shutil.which(tool))
    (tools / "c++").touch(0o755)
    return tmp_path


@pytest.mark.parametrize("script", ["setup.sh", "run_local.sh", "test.sh"])
def test_without_python_the_message_says_what_to_install(copy, script):
    environment = {"PATH": str(copy / "bin"), "HOME": str(copy)}
    done = run(["bash", str(copy / "scripts" / script)], env=environment)
    assert done.returncode != 0
    for remedy in ("apt-get install python3.12", "pyenv install", "uv python install", "PYTHON="):
        assert remedy in done.stdout
    assert not (copy / ".venv").exists()


def test_without_a_gpu_nothing_is_tested_on_it(copy):
    environment = {"PATH": str(copy / "bin"), "HOME": str(copy)}
    done = run(["bash", str(copy / "scripts/test_gpu.sh")], env=environment)
    assert done.returncode == 1
    assert done.stdout == ("No GPU: nvidia-smi is not there or lists none. Nothing was tested.\n")
    assert not (copy / ".venv").exists()


def test_a_wrong_python_is_named(copy):
    environment = {"PATH": str(copy / "bin"), "HOME": str(copy), "PYTHON": "/bin/false"}
    done = run(["bash", str(copy / "scripts/setup.sh")], env=environment)
    assert done.returncode != 0
    assert "PYTHON=/bin/false is not a Python 3.12" in done.stdout


def test_python_is_found_in_pyenv_and_through_a_shim_that_fails(copy):
    """A pyenv shim named python3.12 exists but fails where another version is selected."""
    shim = copy / "bin/python3.12"
    shim.write_text("#!/bin/bash\nexit 127\n")
    shim.chmod(0o755)
    version = copy / ".pyenv/versions/3.12.9/bin"
    version.mkdir(parents=True)
    fake = version / "python3.12"
    fake.write_text('#!/bin/bash\n[[ $1 == -c ]] && exit 0\necho "$0 $*"; exit 3\n')
    fake.chmod(0o755)
    environment = {"PATH": str(copy / "bin"), "HOME": str(copy)}
    done = run(["bash", str(copy / "scripts/setup.sh")], env=environment)
    assert f"{fake} -m venv" in done.stdout
    assert done.returncode == 3
    assert not (copy / ".venv/.installed").exists()


FAKE_PYTHON = """#!/bin/bash
[[ $1 == -c ]] && exit 0
echo "$*" >> log
[[ $2 == venv ]] || exit 0
rm -rf .venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python
"""


def setup_commands(copy):
    """Runs setup.sh with a Python that only writes down what it was to do; returns that."""
    log = copy / "log"
    log.write_text("")
    environment = {"PATH": str(copy / "bin"), "HOME": str(copy)}
    done = run(["bash", str(copy / "scripts/setup.sh")], env=environment)
    assert done.returncode == 0, done.stdout
    return [line.split()[:3] for line in log.read_text().splitlines()]


def test_setup_repeats_what_changed(copy):
    python = copy / "bin/python3.12"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    install = [["-m", "venv", "--clear"], ["scripts/base_packages.py", "constraints.txt"]]
    install += [["-m", "pip", "install"]] * 3
    status = ["setup.py", "--name"]
    assert setup_commands(copy) == [*install, status]
    assert setup_commands(copy) == []
    kernel = copy / "kernels/cpu/new.cpp"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("// new")
    build = [["setup.py", "build_ext", "--inplace"], status]
    assert setup_commands(copy) == build
    assert setup_commands(copy) == []
    (copy / "setup.py").write_text("# changed")
    assert setup_commands(copy) == build
    (copy / "constraints.txt").write_text("# changed")
    assert setup_commands(copy) == [*install, status]


def test_without_a_compiler_the_message_says_what_to_install(copy):
    (copy / "bin/c++").unlink()
    python = copy / "bin/python3.12"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    environment = {"PATH": str(copy / "bin"), "HOME": str(copy)}
    done = run(["bash", str(copy / "scripts/setup.sh")], env=environment)
    assert done.returncode != 0
    assert "apt-get install g++" in done.stdout
    assert not (copy / ".venv").exists()


def run_local(*options):
    """Returns what scripts/run_local.sh printed, and its statistics."""
    if not (ROOT / ".venv/.installed").exists():
        pytest.skip("needs the .venv that scripts/setup.sh makes")
    command = ["bash", str(ROOT / "scripts/run_local.sh"), *options]
    command += ["--log-interval", "10", "--eval-iters", "1"]
    done = run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stdout[-3000:]
    losses = [float(x) for x in re.findall(r"\| lm loss: (\S+) \|", done.stdout)]
    assert losses[-1] < losses[0] - 0.3
    report = json.loads((ROOT / "runs/local/a2a.json").read_text())
    assert f"Total compression {report['ratio_fp32']:.2f}x" in done.stdout
    return done.stdout, report


def test_run_local_trains_and_reports():
    printed, report = run_local("--train-iters", "30")
    assert "CPU host mode" in printed
    assert "lm loss PPL" in printed
    assert report["ratio_fp32"] >= 5.1


@pytest.mark.slow
def test_run_local_fine_tunes_t5():
    printed, report = run_local("t5", "--train-iters", "30", "--decode-samples", "8")
    before, _, after = printed.partition(" iteration       10/")
    for part in (before, after):
        for split in ("validation", "test"):
            assert re.search(rf"answers to 8 of \d+ lines of the {split} set \| exact match", part)
    assert report["ratio_fp32"] >= 4.8
    assert [layer["name"] for layer in report["layers"]] == ["encoder layer 1", "decoder layer 1"]
