"""Which method auto stands for: decided once, the same on every rank."""

from argparse import Namespace
from dataclasses import replace

import pytest

from megatron_moe_comp.options.config import CompressionConfig
from megatron_moe_comp.plan.cost_model import CodecSpeed, Link, Machine
from megatron_moe_comp.plan.shape import Layout, Model, Stack
from megatron_moe_comp.training import auto_method

AUTO = CompressionConfig(moe_a2a_compress="auto", moe_a2a_seed=3)
MODEL = Model((Stack(2, 2, 256),), 512, 2048, 2048, 8, 2, 4, 64, dtype="float32", vocab_size=1000)
LAYOUT = Layout(4, 4, 1)
FAST_CODEC = dict.fromkeys(("rq", "dithered", "gaussian"), CodecSpeed(2e9, 4e9, 1e-6))
MACHINE = Machine(1e13, 1e10, Link(1e8, 1e-5), Link(1e8, 1e-5), FAST_CODEC)


def decided(machine, config=AUTO, layout=LAYOUT):
    return auto_method.decide(config, MODEL, layout, machine)


def test_a_slow_link_and_a_fast_codec():
    decision = decided(MACHINE)
    assert decision.config == AUTO.resolved(6)
    assert decision.config.moe_a2a_compress == "birdmoe"
    assert decision.config.moe_a2a_seed == 3
    saved = decision.as_dict()
    assert (saved["method"], saved["bits"], saved["bit_policy"]) == ("birdmoe", 6, "uniform")
    assert saved["measured"]["link_gbs"] == pytest.approx(0.1)
    assert saved["measured"]["predicted_speedup"] > 1.5
    assert "the speed of none; measured: link 0.1 GB/s" in saved["reason"]


@pytest.mark.parametrize(
    "change",
    [
        {"far": Link(1e11)},
        {"codecs": {"rq": CodecSpeed(1e6, 1e6)}},
        {"codecs": {"rq": CodecSpeed(2e9, 4e9, 10.0)}},
        {"flops": 1e6},
    ],
    ids=["fast link", "slow codec", "slow messages", "slow computing"],
)
def test_where_it_does_not_pay(change):
    decision = decided(replace(MACHINE, **change))
    assert decision.config.moe_a2a_compress == "none"
    assert decision.as_dict()["bits"] is None
    assert decision.reason.startswith("birdmoe is predicted to train at ")


def test_given_bits_leave_only_whether():
    asked = replace(AUTO, moe_a2a_bits=3)
    assert decided(MACHINE, asked).config.moe_a2a_bits == 3
    assert not decided(replace(MACHINE, far=Link(1e11)), asked).config.enabled


def test_a_link_that_hardly_matters_gets_many_bits():
    free = replace(MACHINE, codecs={"rq": CodecSpeed(1e15, 1e15)})
    bits = [
        decided(replace(free, far=Link(bandwidth))).config.moe_a2a_bits
        for bandwidth in (1e8, 1e9, 2e9, 3e9, 4e9, 1e10, 1e13)
    ]
    assert (bits[0], bits[-1]) == (6, None)
    assert 8 in bits


@pytest.mark.parametrize(
    ("saved", "bits", "expected"),
    [("none", None, None), ("birdmoe", None, 7), ("birdmoe", 4, 4), ("none", 4, None)],
)
def test_a_resumed_run_keeps_its_method(saved, bits, expected):
    before = {"method": saved, "bits": 7 if saved == "birdmoe" else None, "measured": {"x": 1.0}}
    decision = auto_method._resumed(before, replace(AUTO, moe_a2a_bits=bits))
    found = decision.config
    assert (found.moe_a2a_bits if found.enabled else None) == expected
    assert decision.as_dict()["measured"] == {"x": 1.0}


def test_other_methods_are_left_alone(monkeypatch):
    monkeypatch.setattr(auto_method, "_initialize_distributed", None)
    config = CompressionConfig(moe_a2a_compress="birdmoe")
    assert auto_method.resolve_auto(Namespace(), config) == (config, None)


def disagreeing(rank):
    """Rank 0 finds a slow link, the others a fast one."""
    kept = []
    replaced = {
        "_initialize_distributed": lambda *_: None,
        "_measured_decision": lambda *_: decided(
            MACHINE if rank == 0 else replace(MACHINE, far=Link(1e11))
        ),
        "checkpoint_start": Namespace(
            auto_decision_of_checkpoint=lambda: None, keep_auto_decision=kept.append
        ),
    }
    before = {name: getattr(auto_method, name) for name in replaced}
    for name, value in replaced.items():
        setattr(auto_method, name, value)
    try:
        config, decision = auto_method.resolve_auto(Namespace(), AUTO)
    finally:
        for name, value in before.items():
            setattr(auto_method, name, value)
    assert kept == [decision]
    return config, decision


def test_all_ranks_do_what_rank_0_decides(pool):
    found = pool.run(disagreeing)
    assert all(each == found[0] for each in found)
    assert found[0][0].moe_a2a_bits == 6
