"""Checkpoints of compressed training in stock Megatron, and the reverse: weights and optimizer."""

import pytest

from tests.end_to_end.forks import launch
from tests.end_to_end.runs import ENTRY, STOCK, train

NONE = "--moe-a2a-compress=none"
pytestmark = pytest.mark.slow
METHODS = {
    "birdmoe": "--moe-a2a-compress=birdmoe",
    # Its state travels in the checkpoint, beside Megatron's own arguments.
    "lsh": "--moe-a2a-compress=lsh --moe-lsh-target-rate 0.3 --moe-lsh-residual identity",
}


def run(directory, name, script, options):
    path = directory / name
    path.mkdir()
    options = f"{options} --use-distributed-optimizer"
    return train(path, options, script=script, launch=launch)


@pytest.mark.parametrize("method", METHODS)
def test_stock_megatron_goes_on_from_a_compressed_run(method, tmp_path):
    save = f"--save {tmp_path}/checkpoints --save-interval 3"
    load = f"--load {tmp_path}/checkpoints --ckpt-step 3"
    assert len(run(tmp_path, "ours", ENTRY, f"{METHODS[method]} {save}").history()["lm loss"]) == 6
    stock = run(tmp_path, "stock", STOCK, load)
    assert "successfully loaded checkpoint" in stock.output
    # The same as stock's twin goes on with: nothing of the state is lost on the way.
    twin = run(tmp_path, "none", ENTRY, f"{NONE} {load}")
    assert stock.history() == twin.history()
    assert set(stock.history()["lm loss"]) == {4, 5, 6}


def test_a_compressed_run_goes_on_from_stock_megatron(tmp_path):
    save = f"--save {tmp_path}/checkpoints --save-interval 3"
    whole = run(tmp_path, "stock", STOCK, save).history()
    load = f"--load {tmp_path}/checkpoints --ckpt-step 3"
    rest = {tag: {step: values[step] for step in (4, 5, 6)} for tag, values in whole.items()}
    assert run(tmp_path, "none", ENTRY, f"{NONE} {load}").history() == rest
    compressed = run(tmp_path, "ours", ENTRY, f"{METHODS['birdmoe']} --moe-a2a-bits=8 {load}")
    losses = compressed.history()["lm loss"]
    assert losses == pytest.approx(rest["lm loss"], rel=1e-2)
    assert losses != rest["lm loss"]
