"""Whole runs with --moe-a2a-compress=auto, told what to have measured."""

import json

import pytest

from tests.end_to_end.forks import launch
from tests.end_to_end.runs import ENTRY, train

SCRIPT = """
import os, runpy
from megatron_moe_comp.training import auto_method
from megatron_moe_comp.plan.cost_model import CodecSpeed, Link, Machine

measure = auto_method.measure_machine

def told(*args):
    machine = measure(*args)
    assert machine.near.bandwidth > 0 < machine.codecs["rq"].encode, machine
    # What the ranks are told differs; they must not act on it.
    bandwidth = {bandwidths}[int(os.environ["RANK"])]
    codecs = {{"rq": CodecSpeed(1e9, 1e9, 1e-6)}}
    return Machine(1e12, 1e10, Link(bandwidth), Link(bandwidth), codecs)

auto_method.measure_machine = told
runpy.run_path({entry!r}, run_name="__main__")
"""
SLOW, FAST = 1e5, 1e14
AUTO = "--moe-a2a-compress=auto --use-distributed-optimizer"


def run(directory, options, *bandwidths):
    """Returns the Run and its statistics."""
    directory.mkdir()
    script = directory / "told.py"
    script.write_text(SCRIPT.format(bandwidths=bandwidths, entry=str(ENTRY)))
    options = f"{AUTO} {options} --moe-a2a-stats-json {directory}/a2a.json"
    found = train(directory, options, script=script, launch=launch)
    assert found.returncode == 0, found.output[-5000:]
    return found, json.loads((directory / "a2a.json").read_text())


@pytest.mark.slow
def test_the_choice_is_made_once_and_kept(tmp_path):
    checkpoints = tmp_path / "saved" / "checkpoints"
    short = "--train-iters 4 --lr-decay-iters 4 --eval-iters 0"
    save = f"{short} --save {checkpoints} --save-interval 2"
    whole, report = run(tmp_path / "saved", save, SLOW, FAST)
    assert (report["method"], report["bits"], report["bit_policy"]) == ("birdmoe", 6, "uniform")
    assert report["auto"]["method"] == "birdmoe"
    assert report["auto"]["measured"]["link_gbs"] == SLOW / 1e9
    assert whole.output.count("all-to-all auto: birdmoe 6 bit, predicted to train at ") == 1
    assert "all-to-all birdmoe 6 bit | iteration" in whole.output

    # A link that has become fast changes nothing about a run that goes on.
    load = f"{short} --load {checkpoints} --ckpt-step 2"
    resumed, report = run(tmp_path / "resumed", load, FAST, SLOW)
    for tag, values in whole.history().items():
        assert resumed.history()[tag] == {step: values[step] for step in (3, 4)}, tag
    assert report["auto"]["reason"] == "as in the checkpoint"
    assert report["auto"]["measured"]["link_gbs"] == SLOW / 1e9

    # It does about one that only starts from there.
    tuned, report = run(tmp_path / "tuned", f"{load} --finetune --train-iters 1", FAST, SLOW)
    assert (report["method"], report["auto"]["method"]) == ("none", "none")
    assert "all-to-all auto: none, birdmoe is predicted to train at " in tuned.output
