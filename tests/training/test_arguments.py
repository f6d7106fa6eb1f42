import sys
from dataclasses import fields

import pytest
from megatron.training.arguments import parse_args

from megatron_moe_comp.compression.wires import WIRES
from megatron_moe_comp.options.config import CompressionConfig
from megatron_moe_comp.training.arguments import (
    add_compression_args,
    add_upcycling_args,
    check_unvalidated,
    check_upcycling_args,
    compression_config_from_args,
    with_our_flags,
)

MODEL = "--hidden-size 64 --num-experts 4 --moe-token-dispatcher-type alltoall"


def parse(monkeypatch, options):
    monkeypatch.setattr(sys, "argv", ["train", *f"{MODEL} {options}".split()])
    return parse_args(add_compression_args)


def config(monkeypatch, options):
    return compression_config_from_args(parse(monkeypatch, options))


def test_defaults(monkeypatch):
    assert config(monkeypatch, "--seed 5") == CompressionConfig(moe_a2a_seed=5)


def test_flags_reach_the_config(monkeypatch):
    options = (
        "--moe-a2a-compress=birdmoe --moe-a2a-bits=5 --moe-a2a-scale-per=chunk --moe-a2a-seed=9 "
        "--moe-a2a-wires dispatch_fwd combine_bwd --moe-a2a-stats-json=x.json "
        "--moe-a2a-bit-policy=proportional --moe-a2a-min-bits=3 --moe-a2a-max-bits=7 "
        "--moe-a2a-scope=inter-node --moe-a2a-ranks-per-node=1 --moe-a2a-dedup"
    )
    assert config(monkeypatch, options) == CompressionConfig(
        moe_a2a_compress="birdmoe",
        moe_a2a_bits=5,
        moe_a2a_scale_per="chunk",
        moe_a2a_seed=9,
        moe_a2a_wires=("dispatch_fwd", "combine_bwd"),
        moe_a2a_stats_json="x.json",
        moe_a2a_bit_policy="proportional",
        moe_a2a_min_bits=3,
        moe_a2a_max_bits=7,
        moe_a2a_scope="inter-node",
        moe_a2a_ranks_per_node=1,
        moe_a2a_dedup=True,
    )


@pytest.mark.parametrize(
    ("options", "wires"),
    [
        ("", WIRES),
        ("--moe-a2a-wires", ()),
        ("--moe-a2a-wires=dispatch_bwd,dispatch_fwd", ("dispatch_fwd", "dispatch_bwd")),
    ],
)
def test_wires(monkeypatch, options, wires):
    assert config(monkeypatch, options).moe_a2a_wires == wires


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--moe-a2a-compress=zip", "--moe-a2a-compress=zip: not one of none, auto, birdmoe"),
        ("--moe-a2a-compress=birdmoe --moe-a2a-bits=1", "--moe-a2a-bits=1: "),
        ("--moe-a2a-compress=birdmoe --hidden-size=100", "--hidden-size=100: .*multiple of 8"),
        ("--moe-a2a-compress=birdmoe --moe-token-dispatcher-type=flex", "dispatcher-type=flex: "),
        ("--moe-a2a-compress=birdmoe --moe-shared-expert-overlap", "shared-expert-overlap: "),
        ("--moe-a2a-compress=birdmoe --cuda-graph-impl=local", "--cuda-graph-impl=local: "),
        ("--moe-a2a-compress=birdmoe --mtp-num-layers=1", "--mtp-num-layers=1: "),
        ("--moe-a2a-compress=birdmoe --overlap-moe-expert-parallel-comm", "parallel-comm: "),
        ("--moe-a2a-wires=up", "--moe-a2a-wires=up: not one of dispatch_fwd"),
    ],
)
def test_refusals(monkeypatch, options, message):
    with pytest.raises(ValueError, match=message):
        config(monkeypatch, options)


def test_a_dense_model_is_refused(monkeypatch):
    args = parse(monkeypatch, "--moe-a2a-compress=birdmoe")
    args.num_experts = None
    with pytest.raises(ValueError, match="--num-experts"):
        compression_config_from_args(args)


def test_every_field_has_one_flag_with_help():
    from argparse import ArgumentParser

    parser = add_compression_args(ArgumentParser(prog="train"))
    actions = {a.dest: a for a in parser._actions if a.dest != "help"}
    assert set(actions) == {f.name for f in fields(CompressionConfig)}
    for name, action in actions.items():
        assert action.option_strings == ["--" + name.replace("_", "-")]
        assert len(action.help) > 30
    assert "{none,auto,birdmoe,lsh,identity,rq," in parser.format_help()


def test_ranks_per_node_come_from_the_launcher(monkeypatch):
    options = "--moe-a2a-compress=rq --moe-a2a-scope=inter-node"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert config(monkeypatch, options).moe_a2a_ranks_per_node == 1
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    with pytest.raises(ValueError, match="Set --moe-a2a-ranks-per-node"):
        config(monkeypatch, options)


def test_upcycling_is_one_starting_point(monkeypatch):
    def check(options):
        monkeypatch.setattr(sys, "argv", ["train", *f"{MODEL} {options}".split()])
        check_upcycling_args(parse_args(add_upcycling_args))

    check("--pretrained-checkpoint dense --spec module function --moe-use-upcycling")
    check("--upcycle-from dense --load mine --save mine")
    for option in ("--pretrained-checkpoint x", "--spec module function", "--moe-use-upcycling"):
        with pytest.raises(
            ValueError, match=rf"--upcycle-from=dense: not with {option.split()[0]}, "
        ):
            check(f"--upcycle-from dense {option}")


def test_training_needs_an_interval_of_evaluation(monkeypatch):
    def check(options):
        monkeypatch.setattr(sys, "argv", ["train", *f"{MODEL} {options}".split()])
        check_unvalidated(parse_args(with_our_flags()))

    for training in ("--train-iters 5", "--train-samples 5"):
        with pytest.raises(ValueError, match=r"--eval-interval: is missing, .* Add --eval-int"):
            check(training)
        for option in ("--eval-interval 100", "--full-validation", "--skip-train"):
            check(f"{training} {option}")
    check("")
