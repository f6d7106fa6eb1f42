"""The sbatch templates on a SLURM of two nodes here: pre-empted, queued again, resumed."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron_moe_comp.watch import read_records
from tests.end_to_end import t5_data
from tests.end_to_end.forks import launch
from tests.end_to_end.runs import EXPERTS, TINY, read_scalars, train
from tests.end_to_end.test_t5_training import BIRDMOE, MODEL
from tests.end_to_end.test_t5_training import ITERATIONS as ITERATIONS_T5

ROOT = Path(__file__).parents[2]
TEMPLATES = [
    ROOT / f"scripts/slurm/{name}.sbatch" for name in ("pretrain_gpt_moe", "finetune_t5_moe")
]
CANNOT = 77
ITERATIONS = 300
TIMEOUT_S = 240


def wait_for(what, condition, timeout_s=TIMEOUT_S):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout_s} s: {what()}"
        time.sleep(0.1)


@pytest.fixture
def slurm(tmp_path):
    """Returns a function that runs a SLURM command on a cluster of two nodes."""
    directory, log = tmp_path / "cluster", tmp_path / "cluster.log"
    ready = directory / "ready"
    command = ["bash", ROOT / "tests/slurm/cluster.sh", directory]
    command += ["bash", "-c", f"touch {ready}; sleep 900"]
    with log.open("w") as output:
        cluster = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        wait_for(log.read_text, lambda: ready.exists() or cluster.poll() is not None)
        if cluster.poll() == CANNOT:
            pytest.skip(log.read_text().strip())
        assert cluster.poll() is None, log.read_text()
        environment = os.environ | {"SLURM_CONF": str(directory / "slurm.conf")}

        def run(*words, **variables):
            done = subprocess.run(
                list(map(str, words)),
                check=False,
                cwd=ROOT,
                env=environment | variables,
                capture_output=True,
                text=True,
            )
            assert not done.returncode, done.stderr
            return done.stdout.strip()

        yield run
    finally:
        cluster.terminate()
        cluster.wait()
        os.killpg(cluster.pid, signal.SIGKILL) if _has_group(cluster.pid) else None


def _has_group(pid):
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


SITE = {
    "MASTER_ADDR": "127.0.0.1",
    "INTERFACE": "lo",
    "RANKS_PER_NODE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "PYTHONWARNINGS": "ignore",
}


def of_this_site(template, data=""):
    """The template with what a site decides as it is here, its data replaced by `data`."""
    text = template.read_text()
    for option in ("gpus-per-node", "cpus-per-task", "time", "partition"):
        text, number = re.subn(rf"(?m)^#SBATCH --{option}=.*\n", "", text)
        assert number == 1, option
    text, number = re.subn(r"(?ms)^DATA=\(.*?^\)", f"DATA=({data})", text)
    assert number == 1
    return text


class Job:
    """A job that was submitted, and its log."""

    def __init__(self, slurm, directory, template, flags, options, data=""):
        self._slurm, self._log = slurm, directory / "job.log"
        self.results = directory / "results"
        script, config = directory / template.name, directory / "tiny.args"
        script.write_text(of_this_site(template, data))
        config.write_text(f"# A tiny model.\n{flags}\n--num-workers 0 # no processes\n")
        words = ("sbatch", "--parsable", f"--output={self._log}", script, config)
        self.id = slurm(*words, *options.split(), RESULTS=str(self.results), **SITE)

    def output(self):
        return self._log.read_text() if self._log.exists() else ""

    def wait_for(self, condition):
        wait_for(lambda: self.output()[-3000:], condition)

    def shown(self):
        return self._slurm("scontrol", "show", "job", self.id)

    def state(self):
        return re.search(r"JobState=(\w+)", self.shown())[1]

    def finish(self):
        self.wait_for(lambda: self.state() in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"))
        assert self.state() == "COMPLETED", self.output()[-3000:]


@pytest.mark.slow
def test_a_job_that_is_pre_empted_goes_on_where_it_was(slurm, tmp_path):
    options = f"--moe-a2a-compress=birdmoe --train-iters {ITERATIONS} --ckpt-format torch"
    job = Job(slurm, tmp_path, TEMPLATES[0], f"{TINY} {EXPERTS}", options)
    job.wait_for(lambda: re.search(r"iteration +10/", job.output()))
    urgent = ("--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1")
    slurm("sbatch", *urgent)
    job.finish()
    text, results = job.output(), job.results
    assert "Restarts=1" in job.shown()
    assert text.count("Told to stop, and saved.") == 1
    saved = int(re.search(r"successfully saved checkpoint from iteration +(\d+)", text)[1])
    assert 10 <= saved < ITERATIONS
    assert re.search(rf"successfully loaded checkpoint .* at iteration {saved}\b", text)
    for start in "01":
        for node in ("node0", "node1"):
            logs = list((results / f"logs/{job.id}-{start}" / node).rglob("stdout.log"))
            assert len(logs) == 1, (start, node)

    whole = train(tmp_path, options, launch=launch).history()
    found = read_scalars(results / "tensorboard")
    records = read_records(results / "a2a.jsonl")
    assert records[-1]["iteration"] == ITERATIONS
    assert any(r["phase_seconds"] and min(r["phase_seconds"].values()) > 0 for r in records)
    for tag, values in whole.items():
        assert len(values) == ITERATIONS
        assert found[tag] == values, tag


@pytest.mark.slow
def test_the_t5_template_trains_on_two_nodes(slurm, tmp_path):
    data = t5_data.write(tmp_path)
    options = f"{BIRDMOE} --ckpt-format torch"
    job = Job(slurm, tmp_path, TEMPLATES[1], f"{MODEL} {EXPERTS}", options, data)
    job.finish()
    losses = read_scalars(job.results / "tensorboard")["lm loss"]
    assert list(losses) == list(range(1, ITERATIONS_T5 + 1))
    assert losses[ITERATIONS_T5] < losses[1] - 1
    assert "lines of the test set | exact match" in job.output()
    assert (job.results / f"logs/{job.id}-0/node1").is_dir()


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shell_scripts_are_clean():
    scripts = [
        path for folder in ("scripts", "benchmarks", "docker", "tests") for path in shells(folder)
    ]
    assert len(scripts) > 7
    done = subprocess.run(["shellcheck", *scripts], check=False, capture_output=True, text=True)
    assert not done.returncode, done.stdout


def shells(folder):
    return [*(ROOT / folder).rglob("*.sh"), *(ROOT / folder).rglob("*.sbatch")]


def test_the_templates_differ_in_script_and_data_alone():
    texts = [of_this_site(template) for template in TEMPLATES]
    lines = [
        [line for line in text.splitlines() if not re.match(r"# |#SBATCH --job-name|SCRIPT=", line)]
        for text in texts
    ]
    assert lines[0] == lines[1]
    for template, text in zip(TEMPLATES, texts, strict=True):
        assert f"SCRIPT={template.stem}.py\n" in text
        assert f"scripts/slurm/{template.name} configs/" in text
