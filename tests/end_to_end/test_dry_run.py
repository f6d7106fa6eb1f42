"""--dry-run on the configurations that are shipped, and against models that are built."""

import re
from pathlib import Path

import pytest

from tests.end_to_end.forks import fork_ranks

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.args"))
BILLIONS = {"gpt_moe_15b": 14.629, "gpt_moe_52b": 51.740, "t5_moe": 9.288, "qwen3_30b_a3b": 30.5}
"""Weights, as published."""
TINY_FLAGS = """
    --num-layers 3 --hidden-size 128 --num-attention-heads 4 --num-query-groups 2
    --group-query-attention --ffn-hidden-size 192 --moe-ffn-hidden-size 96 --swiglu
    --num-experts 8 --moe-layer-freq 2 --moe-router-topk 2 --moe-token-dispatcher-type alltoall
    --moe-shared-expert-intermediate-size 64 --untie-embeddings-and-output-weights
    --disable-bias-linear --position-embedding-type rope --seq-length 16
    --max-position-embeddings 16 --mock-data --tokenizer-type NullTokenizer --vocab-size 1023
    --micro-batch-size 1 --lr 1e-3 --train-iters 1 --eval-iters 0 --eval-interval 1000
    --expert-model-parallel-size 2
"""
TINY = TINY_FLAGS.split()


def flags_of(config):
    return " ".join(line.partition("#")[0] for line in config.read_text().splitlines()).split()


def dry_run(script, flags, ranks, directory):
    (rank,) = fork_ranks(ROOT / script, [f"--dry-run={ranks}", *flags], 1, directory)
    return rank


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_is_valid_and_has_the_published_size(config, tmp_path):
    ranks = int(re.search(r"At least (\d+) GPUs", config.read_text())[1])
    script = "finetune_t5_moe.py" if "t5" in config.stem else "pretrain_gpt_moe.py"
    compression = ["--moe-a2a-compress=birdmoe", "--moe-a2a-bits=8"]
    ended = dry_run(script, [*flags_of(config), *compression], ranks, tmp_path)
    assert ended.returncode == 0, ended.output
    assert f"{ranks} ranks: tensor 1" in ended.output
    total, unit = re.search(r"Weights: (\S+) (billion|million)", ended.output).groups()
    billions = float(total) / (1 if unit == "billion" else 1000)
    if config.stem in BILLIONS:
        assert billions == pytest.approx(BILLIONS[config.stem], rel=0.01)
    memory = float(re.search(r"Memory of a rank: (\S+) GB", ended.output)[1])
    assert 5 < memory < 80, "of an 80 GB GPU"
    # 16 bits to 8 and a scale of 4 bytes; the probability of a row is not compressed.
    assert 1.97 < float(re.search(r"(\S+)x fewer", ended.output)[1]) <= 2


def test_a_rank_holds_the_weights_that_are_said(tmp_path):
    said = dry_run("pretrain_gpt_moe.py", TINY, 2, tmp_path)
    assert said.returncode == 0, said.output
    on_rank = re.search(r"on a rank (\S+) million, (\S+) million of them of experts", said.output)
    built = fork_ranks(ROOT / "pretrain_gpt_moe.py", TINY, 2, tmp_path)
    assert built[0].returncode == 0, built[0].output
    number = int(re.search(r"number of parameters on .*: (\d+)", built[0].output)[1])
    # Norms, and the padding of the vocabulary to 1024, are left out.
    norms = (2 * 3 + 1) * 128 * 2
    assert number - norms == pytest.approx(float(on_rank[1]) * 1e6, rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--dry-run=0: not a number of ranks. Use 1 or more."),
        (["--moe-a2a-compress=birdmoe", "--moe-a2a-bits=9"], "--moe-a2a-bits=9"),
    ],
    ids=["ranks", "our check"],
)
def test_what_cannot_be(flags, message, tmp_path):
    ended = dry_run("pretrain_gpt_moe.py", [*TINY, *flags], 2 if flags else 0, tmp_path)
    assert ended.returncode
    assert message in ended.output


def test_ranks_that_do_not_fit_are_refused(tmp_path):
    ended = dry_run("pretrain_gpt_moe.py", TINY, 3, tmp_path)
    assert ended.returncode
    assert "Weights" not in ended.output
