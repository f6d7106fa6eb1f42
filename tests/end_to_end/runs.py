"""Starts training runs of a tiny model, a GPT-MoE by default, and reads what they logged."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[2]
ENTRY = ROOT / "pretrain_gpt_moe.py"
STOCK = ROOT / "tests/end_to_end/stock_gpt.py"
TIMEOUT_S = 240

TINY = """
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4
    --seq-length 32 --max-position-embeddings 32 --disable-bias-linear
    --micro-batch-size 2 --global-batch-size 8
    --train-iters 6 --eval-iters 1 --eval-interval 100 --lr 1e-3 --log-interval 1
    --mock-data --tokenizer-type NullTokenizer --vocab-size 256 --split 90,5,5
    --tensorboard-log-interval 1
"""
EXPERTS = """
    --num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
    --expert-model-parallel-size 2
"""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    returncode: int
    output: str
    scalars: dict[str, dict[int, float]]
    """TensorBoard tag -> iteration -> value, as float32 was written."""

    def history(self) -> dict[str, dict[int, float]]:
        """Loss and gradient norm of every iteration."""
        assert self.returncode == 0, self.output[-5000:]
        return {tag: self.scalars[tag] for tag in ("lm loss", "grad-norm")}


def torchrun(script, arguments, ranks, directory):
    """Returns the launcher's exit status and what all ranks printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(script), *arguments]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "WANDB_MODE": "offline",
    }
    done = subprocess.run(
        command,
        check=False,
        cwd=directory,
        env=environment,
        timeout=TIMEOUT_S,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def train(
    directory, options="", *, script=ENTRY, model=TINY, experts=EXPERTS, ranks=2, launch=torchrun
):
    """Returns the Run of `script` with the tiny model and `options` (later ones win)."""
    events = directory / "tensorboard"
    arguments = f"{model} {experts} {options}".split()
    arguments += ["--tensorboard-dir", str(events), "--data-cache-path", str(directory / "cache")]
    returncode, output = launch(script, arguments, ranks, directory)
    return Run(returncode, output, read_scalars(events))


def read_scalars(events: Path) -> dict[str, dict[int, float]]:
    """Returns the values of a directory's event files by tag and iteration."""
    if not events.exists():
        return {}
    accumulator = EventAccumulator(str(events), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: {e.step: e.value for e in accumulator.Scalars(tag)} for tag in tags}
