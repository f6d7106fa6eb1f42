"""Whole runs of finetune_t5_moe.py on a task of a few words; the first one with torchrun."""

import json
import re
import shutil

import pytest

from megatron_moe_comp.data.prepare import main as prepare
from tests.end_to_end import t5_data
from tests.end_to_end.forks import fork_ranks, launch
from tests.end_to_end.runs import EXPERTS, ROOT, torchrun, train

SCRIPT = ROOT / "finetune_t5_moe.py"
ITERATIONS, SAVED = 16, 8
MODEL = f"""
    --encoder-num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4
    --encoder-seq-length 24 --decoder-seq-length 16 --max-position-embeddings 24
    --position-embedding-type rope --normalization RMSNorm --disable-bias-linear
    --moe-layer-freq 2 --micro-batch-size 4 --global-batch-size 8
    --train-iters {ITERATIONS} --eval-iters 1 --eval-interval 100 --lr 5e-3
    --lr-decay-style constant --log-interval 1 --tensorboard-log-interval 1 --num-workers 0
"""
NO_DROPOUT = "--hidden-dropout 0 --attention-dropout 0"
BIRDMOE = "--moe-a2a-compress=birdmoe"
LSH = """
    --moe-a2a-compress=lsh --moe-lsh-target-rate 0.3 --moe-lsh-warmup-iters 3
    --use-distributed-optimizer
"""
TP2 = "--tensor-model-parallel-size 2 --expert-tensor-parallel-size 1 --sequence-parallel"
SCORES = re.compile(r"answers to (\d+) of (\d+) lines of the (\w+) set \| exact match: .* \|")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The flags of a tokenizer and of JSONL files."""
    return t5_data.write(tmp_path_factory.mktemp("data"))


def save(directory):
    return f"--save {directory}/checkpoints --save-interval {SAVED}"


def load(directory):
    return f"--load {directory}/checkpoints --ckpt-step {SAVED}"


def predictions(directory):
    return f"--predictions-jsonl {directory}/predictions.jsonl"


def assert_same_from_saved(run, whole, **tolerance):
    """Compares the iterations after the checkpoint."""
    for tag, values in whole.history().items():
        found = run.history()[tag]
        assert list(found) == list(range(SAVED + 1, ITERATIONS + 1))
        expected = {step: values[step] for step in found}
        assert found == (pytest.approx(expected, **tolerance) if tolerance else expected), tag


def finetune(directory, options, *, ranks=2, launch=launch):
    directory.mkdir(exist_ok=True)
    return train(directory, options, script=SCRIPT, model=MODEL, ranks=ranks, launch=launch)


def assert_trained(run, compression, *, answers=True):
    losses = run.history()["lm loss"]
    assert len(losses) == ITERATIONS
    assert losses[ITERATIONS] < losses[1] - 1, losses
    routers = run.scalars["load_balancing_loss"]
    assert len(routers) == ITERATIONS
    # 1 when all experts are equally loaded, 4 if one of them takes all.
    assert all(0.9 < loss < 4 for loss in routers.values()), routers
    assert run.output.count(f" all-to-all {compression} ") == ITERATIONS
    if answers:
        assert all(float(line.split()[-2]) > 0.2 for line in scores(run)), scores(run)


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """A run without compression or dropout that saved a checkpoint, and its directory."""
    base = tmp_path_factory.mktemp("plain")
    options = f"{data} {NO_DROPOUT} --moe-a2a-stats-json {base}/a2a.json"
    return base, finetune(base, f"{options} {save(base)}", launch=torchrun)


def test_training_without_compression(plain):
    base, run = plain
    assert_trained(run, "none")
    report = json.loads((base / "a2a.json").read_text())
    assert [layer["name"] for layer in report["layers"]] == ["encoder layer 1", "decoder layer 1"]


EP4 = f"{BIRDMOE} --expert-model-parallel-size 4 --micro-batch-size 2"


def test_birdmoe_over_four_ranks(data, tmp_path):
    options = f"{data} {EP4} --moe-a2a-stats-json {tmp_path}/a2a.json {predictions(tmp_path)}"
    run = finetune(tmp_path, options, ranks=4)
    assert_trained(run, "birdmoe 6 bit optimal")
    report = json.loads((tmp_path / "a2a.json").read_text())
    assert [layer["name"] for layer in report["layers"]] == ["encoder layer 1", "decoder layer 1"]
    assert report["ratio_fp32"] > 4
    # The test set is evaluated last; it has other numbers of lines for the ranks.
    answers = [json.loads(line) for line in read_predictions(tmp_path).splitlines()]
    assert len(answers) == t5_data.LINES["test"]
    for answer in answers:
        assert answer["target"] == t5_data.target(answer["input"][-1])


def read_predictions(directory):
    return (directory / "predictions.jsonl").read_text()


@pytest.fixture(scope="module")
def clustered(data, tmp_path_factory):
    """An uninterrupted lsh run with dropout that saved checkpoints, and its directory."""
    base = tmp_path_factory.mktemp("lsh")
    return base, finetune(base, f"{data} {LSH} {save(base)} {predictions(base)}")


def test_lsh(clustered):
    assert_trained(clustered[1], "lsh")


def test_resuming_repeats_the_uninterrupted_run(data, clustered, tmp_path):
    base, whole = clustered
    resumed = finetune(tmp_path, f"{data} {LSH} {load(base)} {predictions(tmp_path)}")
    assert_same_from_saved(resumed, whole)
    assert read_predictions(tmp_path) == read_predictions(base)


def scores(run):
    """Returns the lines with the scores that a run ended with, of validation and test set."""
    assert run.returncode == 0, run.output[-5000:]
    found = [found.group(0) for found in SCORES.finditer(run.output)][-2:]
    for line, split in zip(found, ("validation", "test"), strict=True):
        # Ranks that share a model answer once.
        number = t5_data.LINES["valid" if split == "validation" else split]
        assert line.startswith(f"answers to {number} of {number} lines of the {split} set | ")
    return found


def test_a_saved_model_answers_as_it_did(data, clustered, tmp_path):
    base, whole = clustered
    options = f"{data} {LSH} --load {base}/checkpoints --skip-train {predictions(tmp_path)}"
    run = finetune(tmp_path, options)
    assert scores(run) == scores(whole)
    assert read_predictions(tmp_path) == read_predictions(base)
    losses = [
        re.findall(r"on (?:validation|test) set \| lm loss value: \S+", done.output)
        for done in (run, whole)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_tensor_parallelism_computes_the_same(data, plain, tmp_path):
    base, whole = plain
    options = f"{data} {NO_DROPOUT} {TP2} {load(base)} --no-load-rng"
    ours = finetune(tmp_path, options, ranks=4)
    assert_same_from_saved(ours, whole, rel=1e-5)
    assert scores(ours) == scores(whole)


def test_tensor_parallelism_in_bfloat16(data, tmp_path):
    run = finetune(tmp_path, f"{data} {TP2} --bf16 {BIRDMOE}", ranks=4)
    assert_trained(run, "birdmoe 6 bit optimal")


def test_span_corruption(tmp_path):
    sources = tmp_path / "sources"
    sources.mkdir()
    for number in range(20):
        lines = [f"name_{i} = function_{i % 7}(value, {number})" for i in range(30)]
        (sources / f"module_{number}.py").write_text("\n".join(lines))
    prefix = tmp_path / "tokens"
    prepared = f"--model t5 --input {sources} --vocab-size 460 --workers 1 --split 80,10,10"
    assert prepare([*prepared.split(), "--output-prefix", str(prefix)]) == 0
    flags = [f"--{split}-data-path {prefix}_{split}" for split in ("train", "valid", "test")]
    flags += [
        "--tokenizer-type SentencePieceTokenizer",
        f"--tokenizer-model {prefix}_tokenizer.model",
    ]
    options = "--task span-corruption --encoder-seq-length 64 --max-position-embeddings 64"
    run = finetune(tmp_path, f"{options} {BIRDMOE} {' '.join(flags)}")
    assert_trained(run, "birdmoe 6 bit optimal", answers=False)


ERRORS = {
    "no target length": (
        lambda options: re.sub(r"--decoder-seq-length \S+", "", options),
        "--decoder-seq-length: needed, the most tokens of a target",
    ),
    "pipeline": (
        lambda options: f"{options} --pipeline-model-parallel-size 2",
        "--pipeline-model-parallel-size=2: not with T5, since Megatron's T5 has no pipeline stages."
        " Drop the option.",
    ),
    "odd length": (
        lambda options: f"{options} {TP2} --decoder-seq-length 15",
        "--decoder-seq-length=15: --sequence-parallel divides positions among the 2 tensor parallel"
        " ranks. Use a multiple of 2.",
    ),
    "vocabulary": (
        lambda options: f"{options} --padded-vocab-size 256",
        "--padded-vocab-size=256: the tokenizer has 385 pieces. Use that or more, or drop",
    ),
    "layers": (
        lambda options: f"{options} --moe-layer-freq [1,0,1]",
        "--moe-layer-freq=[1, 0, 1]: a list must have a 0 or 1 for each of the 2 layers",
    ),
}


def fail(directory, options):
    """Yields the error that each of two ranks ended with."""
    for rank in fork_ranks(SCRIPT, options.split(), 2, directory):
        assert rank.returncode == 1, rank
        assert "\ntraining ..." not in rank.output
        # What was printed before may come after it, when the buffer is flushed.
        yield [line for line in rank.output.splitlines() if "Error: " in line][-1]


@pytest.mark.parametrize(("change", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_an_unusable_option_ends_every_rank(data, tmp_path, change, message):
    for last_line in fail(tmp_path, change(f"{MODEL} {EXPERTS} {data}")):
        assert last_line.startswith(f"ValueError: {message}"), last_line


def test_a_checkpoint_of_another_activation_is_refused(data, plain, tmp_path):
    options = f"{MODEL} {EXPERTS} {data} {load(plain[0])} --t5-activation geglu"
    for last_line in fail(tmp_path, options):
        assert last_line.startswith(f"ValueError: --t5-activation=geglu: --load {plain[0]}")
        assert last_line.endswith("was saved with None. Drop it.")


def test_a_bad_line_ends_every_rank(data, tmp_path):
    path = tmp_path / "train.jsonl"
    shutil.copyfile(data.split()[data.split().index("--train-data-path") + 1], path)
    with path.open("a") as stream:
        stream.write('{"input": "x"}\n')
    lines = t5_data.LINES["train"] + 1
    for last_line in fail(tmp_path, f"{MODEL} {EXPERTS} {data} --train-data-path {path}"):
        assert last_line.endswith(
            f"1 of {lines} lines of {path} hold no pair: line {lines}: no 'target': correct them, "
            "or pass --bad-lines skip to leave them out"
        )
