import json

import pytest

from megatron_moe_comp.plan import presets
from megatron_moe_comp.plan.__main__ import main
from megatron_moe_comp.plan.operations import weights_per_rank
from megatron_moe_comp.plan.shape import Layout
from tests.end_to_end.forks import launch

MODEL = "--hidden-size 512 --layers 4 --experts 8 --seq-length 256 --dtype float32"
RANKS = "--ranks 4 --expert-parallel 4 --ranks-per-node 1"
GPT = """
    pretrain_gpt_moe.py --num-layers 4 --hidden-size 512 --num-attention-heads 8 --seq-length 256
    --num-experts 8 --moe-router-topk 2 --expert-model-parallel-size 4 --micro-batch-size 4
    --moe-token-dispatcher-type alltoall --vocab-size 50304 --global-batch-size 128
"""


def run(capsys, tmp_path, options):
    """Returns the JSON file and what was printed."""
    path = tmp_path / "plan.json"
    main(["--json", str(path), *options.split()])
    return json.loads(path.read_text()), " ".join(capsys.readouterr().out.split())


def test_a_slow_link_is_worth_compressing_for(capsys, tmp_path):
    found, text = run(capsys, tmp_path, f"{MODEL} {RANKS} --inter-bandwidth 0.05 --tflops 5")
    rows = {row["method"]: row for row in found["rows"]}
    assert found["recommended"] == "birdmoe 6 bit"
    assert found["flags"][:2] == ["--moe-a2a-compress=birdmoe", "--moe-a2a-bits=6"]
    assert " ".join(found["flags"]) in text
    assert rows["none"]["speedup"] == 1
    assert rows["birdmoe 6 bit"]["speedup"] == max(
        row["speedup"] for row in found["rows"][:-3] if not row["changes_training"]
    )
    assert rows["birdmoe 3 bit"]["speedup"] > rows["birdmoe 6 bit"]["speedup"]
    assert {n for n, row in rows.items() if row["changes_training"]} == {
        "birdmoe 4 bit",
        "birdmoe 3 bit",
        "lsh 20%",
        "lsh 20% rq 4 bit",
    }
    ratio = rows["none"]["bytes_per_rank"] / rows["birdmoe 8 bit"]["bytes_per_rank"]
    assert ratio == pytest.approx((2 * 512 * 4 + 4) / (2 * (512 + 4) + 4), rel=0.01)
    assert "change training, see README" in text


def test_lossy_methods_are_recommended_on_request_only(capsys, tmp_path):
    options = f"{MODEL} {RANKS} --inter-bandwidth 0.01 --allow-lossy"
    found, _ = run(capsys, tmp_path, options)
    assert found["recommended"] == "lsh 20% rq 4 bit"
    assert "--moe-lsh-target-rate=0.2" in found["flags"]


def test_a_fast_link_is_not(capsys, tmp_path):
    found, text = run(capsys, tmp_path, f"{MODEL} {RANKS} --inter-bandwidth 400 --tflops 1")
    assert found["recommended"] == "none"
    assert found["flags"] == ["--moe-a2a-compress=none"]
    assert "Do not compress" in text
    # The break-evens say from where on it would be.
    row = next(row for row in found["rows"] if row["method"] == "birdmoe 6 bit")
    limit = row["pays_below_bytes_per_s"] / 1e9
    options = f"{MODEL} {RANKS} --tflops 1e6 --inter-bandwidth"
    for bandwidth, pays in ((0.9 * limit, True), (1.1 * limit, False)):
        found, _ = run(capsys, tmp_path, f"{options} {bandwidth}")
        row = next(row for row in found["rows"] if row["method"] == "birdmoe 6 bit")
        assert (row["speedup"] > 1) == pays


def test_a_megatron_command_says_the_same(capsys, tmp_path):
    machine = "--ranks 4 --ranks-per-node 1 --inter-bandwidth 0.1"
    ours, _ = run(capsys, tmp_path, f"{machine} --expert-parallel 4 {MODEL}")
    theirs, _ = run(capsys, tmp_path, f"{machine} -- {' '.join(GPT.split())}")
    for mine, other in zip(ours["rows"], theirs["rows"], strict=True):
        assert mine["method"] == other["method"]
        assert mine["step_s"] == pytest.approx(other["step_s"])


def test_its_own_options_are_kept(capsys, tmp_path):
    command = " ".join(GPT.split()) + (
        " --moe-a2a-chunks 4 --moe-a2a-wires combine_fwd --moe-a2a-scope inter-node "
        "--moe-a2a-ranks-per-node 2"
    )
    options = "--ranks 4 --ranks-per-node 2 --inter-bandwidth 0.01 --inter-latency 0"
    found, text = run(capsys, tmp_path, f"{options} -- {command}")
    kept = [
        "--moe-a2a-chunks=4",
        "--moe-a2a-scope=inter-node",
        "--moe-a2a-ranks-per-node=2",
        "--moe-a2a-wires=combine_fwd",
    ]
    assert found["flags"][3:] == kept
    assert " ".join(kept) in text
    rows = {row["method"]: row for row in found["rows"]}
    assert rows["birdmoe 6 bit"]["bytes_per_rank"] > 0.75 * rows["none"]["bytes_per_rank"]


def test_the_table_of_published_models(capsys, tmp_path):
    rows, text = run(capsys, tmp_path, "--table")
    assert len(rows) == len(presets.MODELS) * len(presets.NETWORKS) * len(presets.TABLE_RANKS)
    assert {row["ranks"] for row in rows} == {8, 64, 512, 4096}
    for row in rows:
        assert (row["method"] == "none") == (row["speedup"] == 1)
    assert "Assumed, not measured" in text
    best = {row["network"]: row["speedup"] for row in rows if row["ranks"] == 512}
    assert best["100 Gbit/s Ethernet per node of 8"] == max(best.values()) > 1.5


def test_published_sizes():
    for name, billions in (("GPT-MoE 52B", 52), ("T5-MoE 26B", 26.3), ("Qwen3-30B", 30.5)):
        (model,) = (m for n, m in presets.MODELS.items() if n.startswith(name))
        total = sum(weights_per_rank(model, Layout(1, 1, 1)))
        assert total / 1e9 == pytest.approx(billions, rel=0.03), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--expert-parallel 3", "--ranks=8: cannot be divided into expert parallel groups of 3"),
        ("--tflops 0", "--tflops=0.0: nothing would ever end"),
        ("-- train.py --num-layers 2", "pretrain_gpt_moe.py"),
        ("--layers x", "--layers"),
    ],
)
def test_errors(capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        main(options.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_measuring_where_it_runs(tmp_path):
    script = tmp_path / "plan.py"
    script.write_text("from megatron_moe_comp.plan.__main__ import main\nmain()\n")
    options = "--measure --expert-parallel 2 --hidden-size 64 --layers 2 --experts 4"
    options += " --seq-length 64 --dtype float32 --ranks-per-node 1 --json plan.json"
    returncode, output = launch(script, options.split(), 2, tmp_path)
    assert returncode == 0, output
    assert output.count("2 ranks, expert parallel 2") == 1
    machine = json.loads((tmp_path / "plan.json").read_text())["machine"]
    assert machine["near"]["bandwidth"] is None  # nobody else is on the node
    assert 0 < machine["far"]["bandwidth"] < presets.NVLINK.bandwidth
    assert 0 < machine["flops"] < presets.FLOPS
