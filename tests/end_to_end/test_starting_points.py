"""Training runs that start from another run's checkpoint."""

import pytest

from tests.end_to_end.forks import launch
from tests.end_to_end.runs import train

EXACT = "--hidden-dropout 0 --attention-dropout 0 --train-iters 2 --save-interval 2"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Options and a checkpoint of a dense run, and the loss of its next step."""
    base = tmp_path_factory.mktemp("dense")
    options = f"{EXACT} --swiglu --save {base}/checkpoints"
    first = train(base, options, ranks=1, experts="", launch=launch)
    assert first.returncode == 0, first.output[-5000:]
    further = base / "further"
    further.mkdir()
    options = f"{EXACT} --swiglu --load {base}/checkpoints --finetune --no-load-optim"
    return base / "checkpoints", train(
        further, options, ranks=1, experts="", launch=launch
    ).history()["lm loss"]


def test_upcycling_and_a_requeued_job(dense, tmp_path):
    checkpoints, losses = dense
    options = f"{EXACT} --swiglu --upcycle-from {checkpoints} --ckpt-format torch"
    options += f" --load {tmp_path}/checkpoints --save {tmp_path}/checkpoints --moe-layer-freq 2"
    run = train(tmp_path, options, launch=launch)
    assert run.history()["lm loss"][1] == pytest.approx(losses[1], rel=1e-6)
    assert f"--upcycle-from: experts start as the feed-forwards of {checkpoints}" in run.output
    again = tmp_path / "again"
    again.mkdir()
    requeued = train(
        again, f"{options} --train-iters 3 --override-opt_param-scheduler", launch=launch
    )
    assert list(requeued.history()["lm loss"]) == [3]
    assert "--upcycle-from: skipped, since --load" in requeued.output


def test_a_dense_checkpoint_does_not_fit(dense, tmp_path):
    run = train(tmp_path, f"{EXACT} --swiglu --load {dense[0]} --finetune", launch=launch)
    assert run.returncode != 0
    assert f"ValueError: --load={dense[0]}: the checkpoint of iteration 2 does not" in run.output
    assert "mlp.experts.experts.linear_fc1.weight [2, 4, 192, 64]" in run.output
    assert "start from it with --upcycle-from" in run.output
