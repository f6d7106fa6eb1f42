"""What the templates start, srun replaced: the image's code or the user's; what they refuse."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Says what the container would be and runs the rest here.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do
    case $1 in
    --container-*) echo "$1 $2" && shift 2 ;;
    *) shift ;;
    esac
done
SLURM_JOB_NUM_NODES=1 SLURMD_NODENAME=node0 exec "$@"
"""
SCRIPT = """import code_that_runs, os, sys
print("code", code_that_runs.__file__, "in", os.getcwd(), "flags", sys.argv[1:5])
"""


@pytest.mark.parametrize("of_user", [False, True])
def test_an_image_runs_its_own_code_on_the_data_of_the_checkout(tmp_path, of_user):
    checkout, image = tmp_path / "checkout", tmp_path / "image"
    for code in (checkout, image):
        shutil.copytree(ROOT / "scripts/slurm", code / "scripts/slurm")
        (code / "pretrain_gpt_moe.py").write_text(SCRIPT)
        (code / "code_that_runs.py").touch()
        (code / ".venv/bin").mkdir(parents=True)
        (code / ".venv/bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (code / ".venv/bin/python").chmod(0o755)
    (checkout / "tiny.args").write_text("--num-layers 2\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/srun").write_text(SRUN)
    (tmp_path / "bin/srun").chmod(0o755)
    template = checkout / "scripts/slurm/pretrain_gpt_moe.sbatch"
    template.write_text(template.read_text().replace("/opt/megatron_moe_comp", str(image)))
    code = image
    if of_user:
        code = tmp_path / "own"
        shutil.copytree(image, code)
        own = f"SCRIPT={code}/pretrain_gpt_moe.py"
        template.write_text(template.read_text().replace("SCRIPT=pretrain_gpt_moe.py", own))
    site = {"IMAGE": "/moe.sqsh"}
    site |= {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "tiny", "SLURM_JOB_NODELIST": "node0"}
    site |= {"MASTER_ADDR": "127.0.0.1", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", template, "tiny.args"],
        check=False,
        cwd=checkout,
        env=os.environ | site,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert not done.returncode, done.stdout
    assert f"code {code}/code_that_runs.py in {checkout} flags ['--num-layers', '2'," in done.stdout
    containers = [
        "--container-image /moe.sqsh",
        f"--container-mounts {checkout}:{checkout}",
        f"--container-workdir {checkout}",
    ]
    assert re.findall("^--container.*", done.stdout, flags=re.MULTILINE) == containers


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"DATA_PATH": "data/none"}, r"-path data/none\S*: is not there. .*set DATA_PATH"),
        (
            {"DATA_PATH": "here", "TOKENIZER": "data/none.model"},
            "--tokenizer-model data/none.model",
        ),
        ({"DATA_PATH": "here", "TOKENIZER": "here.idx"}, r"bin/python: .*scripts/setup.sh"),
        ({"DATA_PATH": "here", "TOKENIZER": "here.idx", "PYTHON": "nopython"}, "nopython: is not"),
        ({"cwd": "scripts"}, "Submit from the root of the clone, not .*/scripts"),
    ],
)
@pytest.mark.parametrize("template", ["pretrain_gpt_moe", "finetune_t5_moe"])
def test_what_is_missing_is_said_before_anything_starts(tmp_path, template, changes, words):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "tiny.args").touch()
    for name in ("here.idx", "here_train.jsonl", "here_valid.jsonl", "here_test.jsonl"):
        (tmp_path / name).touch()
    site = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "tiny", "SLURM_JOB_NODELIST": "node0"}
    done = subprocess.run(
        ["bash", tmp_path / f"scripts/slurm/{template}.sbatch", tmp_path / "tiny.args"],
        check=False,
        cwd=tmp_path / changes.get("cwd", ""),
        env=os.environ | site | changes,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(words, done.stderr), done.stderr
