"""Interrupted, concurrent and repeated preparations of one prefix."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_moe_comp.data.errors import PreparationError
from megatron_moe_comp.data.options import PrepareOptions
from megatron_moe_comp.data.outputs import Outputs
from megatron_moe_comp.data.pipeline import prepare


def wait_until(condition, what, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.002)


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def children_of(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def large_jsonl(tmp_path):
    """Text that takes a second or more to encode."""
    path = tmp_path / "large.jsonl"
    words = [f"name_{i % 97}({i})" for i in range(60)]
    with path.open("w") as stream:
        for i in range(1500):
            text = " ".join(words[i % 7 :] + words[: i % 11]) + f"\n\t# {i}\n"
            stream.write(json.dumps({"text": text * 2}) + "\n")
    return path


def test_killed_run_leaves_no_file_and_is_run_again(large_jsonl, tmp_path, read_files):
    prefix = tmp_path / "killed"
    options = {"vocab_size": 400, "workers": 2}
    arguments = ["--input", str(large_jsonl), "--output-prefix", str(prefix)]
    arguments += ["--vocab-size", "400", "--workers", "2"]
    run = subprocess.Popen(
        [sys.executable, "-m", "megatron_moe_comp.data.prepare", *arguments],
        stderr=subprocess.DEVNULL,
    )
    half_written = Outputs(Outputs(prefix).partial / prefix.name).bin("train")
    try:
        wait_until(
            lambda: run.poll() is not None or size_of(half_written) > 0,
            "the first token ids",
        )
        assert run.poll() is None, "the run ended before it could be killed"
        workers = children_of(run.pid)
        assert len(workers) >= 2
    finally:
        run.kill()
        run.wait()
    assert run.returncode == -signal.SIGKILL
    assert half_written.exists()
    assert sorted(path.name for path in tmp_path.glob("killed*")) == [
        "killed.lock",
        "killed.partial",
    ]
    wait_until(lambda: not any(map(is_running, workers)), "the workers to end with their parent")

    again = prepare(PrepareOptions(str(prefix), (str(large_jsonl),), **options))
    assert not again.reused
    assert not Outputs(prefix).partial.exists()
    prepare(PrepareOptions(str(tmp_path / "whole"), (str(large_jsonl),), **options))
    killed, whole = read_files(prefix), read_files(tmp_path / "whole")
    for files in (killed, whole):
        del files["_manifest.json"]
    assert len(killed) == 7
    assert killed == whole


def test_death_between_renames_never_mixes_two_runs(code_directory, tmp_path, monkeypatch):
    """Each point of the publication is the last in turn: all files found are of the new run."""
    prefix = tmp_path / "code"
    inputs = (str(code_directory),)
    old = PrepareOptions(str(prefix), inputs, vocab_size=310, workers=1)
    new = PrepareOptions(str(prefix), inputs, vocab_size=330, workers=1)
    prepare(PrepareOptions(str(tmp_path / "new"), inputs, vocab_size=330, workers=1))
    finished = {
        path.name.removeprefix("new"): path.read_bytes() for path in tmp_path.glob("new_[tv]*")
    }
    replace = os.replace

    class Died(BaseException):
        pass

    for survivors in range(len(finished) + 1):
        prepare(old)
        left = survivors

        def replace_some(source, target):
            nonlocal left
            if left == 0:
                raise Died
            left -= 1
            replace(source, target)

        monkeypatch.setattr(os, "replace", replace_some)
        with pytest.raises(Died):
            prepare(new)
        monkeypatch.setattr(os, "replace", replace)
        found = {path.name.removeprefix("code"): path for path in tmp_path.glob("code_*")}
        assert len(found) == survivors
        assert all(path.read_bytes() == finished[name] for name, path in found.items())
        assert Outputs(prefix).read_manifest() is None
    assert not prepare(new).reused
    assert all(
        path.read_bytes() == finished[path.name.removeprefix("code")]
        for path in tmp_path.glob("code_[tv]*")
    )


def test_two_at_the_same_time_build_once(code_directory, tmp_path):
    options = PrepareOptions(
        str(tmp_path / "code"), (str(code_directory),), vocab_size=320, workers=1
    )
    results, messages = [], []
    start = threading.Barrier(2)

    def run():
        start.wait()
        results.append(prepare(options, messages.append))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(result.reused for result in results) == [False, True]
    assert results[0].manifest == results[1].manifest
    assert f"waiting for another preparation of {tmp_path / 'code'}" in messages
    assert not Outputs(tmp_path / "code").partial.exists()


def test_lost_worker_is_an_error_and_not_a_wait(large_jsonl, tmp_path, monkeypatch):
    from megatron_moe_comp.data import encoding

    submit_ahead = encoding._submit_ahead

    def kill_one_worker(pool, *rest, **options):
        for number, item in enumerate(submit_ahead(pool, *rest, **options)):
            if number == 0:
                os.kill(next(iter(pool._processes)), signal.SIGKILL)
            yield item

    monkeypatch.setattr(encoding, "_submit_ahead", kill_one_worker)
    options = PrepareOptions(str(tmp_path / "out"), (str(large_jsonl),), vocab_size=400, workers=2)
    with pytest.raises(PreparationError, match="--workers 2: a worker process died"):
        prepare(options)
    assert not list(tmp_path.glob("out_*"))


def test_finished_preparation_is_found_at_once(code_directory, tmp_path):
    """A second run imports neither torch nor Megatron, which would take seconds."""
    arguments = ["--input", str(code_directory), "--output-prefix", str(tmp_path / "code")]
    prepare(PrepareOptions(str(tmp_path / "code"), (str(code_directory),), vocab_size=320))
    program = (
        "import sys\nfrom megatron_moe_comp.data.prepare import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "assert not {'torch', 'megatron'} & set(sys.modules), 'imported for nothing'\n"
    )
    # Nothing can be written, so nothing is.
    for path in tmp_path.glob("code_*"):
        path.chmod(0o444)
    run = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--vocab-size", "320"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.startswith("already prepared, nothing to do")
    assert run.stderr == ""
