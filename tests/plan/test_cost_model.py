from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_comp.options.config import CompressionConfig
from megatron_moe_comp.plan.break_even import break_even_bandwidth, break_even_message
from megatron_moe_comp.plan.cost_model import CodecSpeed, Link, Machine, predict
from megatron_moe_comp.plan.methods import method_of, stock_method
from megatron_moe_comp.plan.operations import expert_flops
from megatron_moe_comp.plan.shape import Layout, Model, Stack

quick = settings(deadline=None, max_examples=30)
INFINITE = float("inf")
FREE = dict.fromkeys(("rq", "identity"), CodecSpeed(INFINITE, INFINITE))
SLOW = dict.fromkeys(("rq", "identity"), CodecSpeed(2e9, 4e9, 1e-4))


def model_of(hidden=256, experts=8, topk=2, micro_batch=4, length=64, layers=2, **more):
    return Model(
        (Stack(layers, layers, length),),
        hidden,
        4 * hidden,
        4 * hidden,
        experts,
        topk,
        micro_batch,
        2,
        **more,
    )


def machine_of(bandwidth=1e9, latency=0.0, flops=1e12, codecs=SLOW, memory=1e10):
    return Machine(flops, memory, Link(10 * bandwidth, latency), Link(bandwidth, latency), codecs)


def birdmoe(bits=6, **options):
    options = {"moe_a2a_bit_policy": "uniform", "moe_a2a_codec": "rq"} | options
    return CompressionConfig(moe_a2a_compress="birdmoe", moe_a2a_bits=bits, **options)


models = st.builds(
    model_of,
    hidden=st.sampled_from([64, 256, 1000, 4096]),
    experts=st.sampled_from([8, 64]),
    topk=st.integers(1, 4),
    micro_batch=st.integers(4, 64),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
layouts = st.builds(
    Layout,
    ranks=st.just(16),
    expert_parallel=st.sampled_from([2, 4, 8]),
    ranks_per_node=st.sampled_from([1, 2, 4, 16]),
    load=st.floats(1, 3),
)


@quick
@given(
    servers=st.integers(2, 64),
    per_server=st.sampled_from([1, 8]),
    topk=st.integers(1, 8),
    hidden=st.sampled_from([1024, 4096, 12288]),
)
def test_the_scaling_law_of_lsh_moe(servers, per_server, topk, hidden):
    """T_a2a / T_compute = FLOPS / (6 B_inter) * k / (1 + 2k) * (w - 1) / (w H), A.2."""
    ranks = servers * per_server
    tokens = 64 * ranks  # a sequence of one position has next to no attention scores
    model = model_of(hidden, ranks, topk, tokens, length=1, vocab_size=0, prob_bytes=0)
    layout = Layout(ranks, ranks, per_server)
    machine = replace(machine_of(bandwidth=1e10), near=Link(INFINITE))
    found = predict(model, layout, machine, stock_method(model, layout))
    assert found.experts == pytest.approx(
        2 * topk * 12 * 4 * hidden * hidden * tokens * 2 / machine.flops
    )
    values_per_second = machine.far.bandwidth / model.value_bytes
    law = machine.flops / (6 * values_per_second) * topk / (1 + 2 * topk)
    law *= (servers - 1) / (servers * hidden)
    router = ranks / (4 * hidden * (1 + 2 * topk))  # which the paper leaves out
    computing = (found.dense + found.experts) / (1 + router)
    assert found.all_to_all / computing == pytest.approx(law, rel=0.01)


@quick
@given(models, layouts, st.integers(2, 8))
def test_free_codecs_and_computing_leave_the_ratio_of_bytes(model, layout, bits):
    machine = machine_of(flops=INFINITE, codecs=FREE, memory=INFINITE)
    layout = replace(layout, ranks=layout.expert_parallel, load=1.0, ranks_per_node=1)
    model = replace(model, vocab_size=0)
    stock = predict(model, layout, machine, stock_method(model, layout))
    ours = predict(model, layout, machine, method_of("ours", birdmoe(bits), model, layout))
    # Gradients of the dense weights still take their time.
    assert stock.gradients == ours.gradients
    speedup = (stock.step - stock.gradients) / (ours.step - ours.gradients)
    assert speedup == pytest.approx(stock.wire_bytes / ours.wire_bytes)
    row, value = model.hidden_size, model.value_bytes
    plain = 2 * row * value + model.prob_bytes
    coded = 2 * (row * bits / 8 + 4) + model.prob_bytes
    assert speedup == pytest.approx(plain / coded, rel=0.02)


@quick
@given(models, layouts, st.sampled_from([5, 8]), st.integers(1, 8), st.floats(1e7, 1e11))
def test_a_faster_link_is_never_slower_and_gains_less(model, layout, bits, chunks, bandwidth):
    methods = [
        stock_method(model, layout),
        method_of("ours", birdmoe(bits, moe_a2a_chunks=chunks), model, layout),
    ]
    machines = [machine_of(bandwidth, 1e-5), machine_of(2 * bandwidth, 1e-5)]
    slow, fast = ([predict(model, layout, m, x).step for x in methods] for m in machines)
    assert all(b <= a for a, b in zip(slow, fast, strict=True))
    assert fast[0] - fast[1] <= (slow[0] - slow[1]) * (1 + 1e-9) + 1e-9


@quick
@given(models, layouts, st.integers(1, 64))
def test_pieces_overlap_but_hide_no_more_than_there_is(model, layout, chunks):
    no_fixed_times = {"rq": CodecSpeed(2e9, 4e9)}
    machine = machine_of(codecs=no_fixed_times)
    whole, pieces = (
        predict(model, layout, machine, method_of("x", birdmoe(moe_a2a_chunks=c), model, layout))
        for c in (1, chunks)
    )
    assert whole.all_to_all == pytest.approx(whole.transfer + whole.codec)
    assert pieces.all_to_all <= whole.all_to_all * (1 + 1e-9)
    assert pieces.all_to_all >= max(pieces.transfer, pieces.codec) * (1 - 1e-9)
    costly = predict(
        model,
        layout,
        replace(machine, codecs={"rq": CodecSpeed(2e9, 4e9, 1.0)}),
        method_of("x", birdmoe(moe_a2a_chunks=chunks), model, layout),
    )
    wires = 4 * model.stacks[0].num_moe_layers * model.num_microbatches
    assert costly.all_to_all >= wires * chunks * 2


@quick
@given(models, layouts, st.integers(5, 8))
def test_at_the_break_even_both_take_as_long(model, layout, bits):
    machine = machine_of(1e9, 1e-5)
    stock, ours = stock_method(model, layout), method_of("ours", birdmoe(bits), model, layout)
    name = "far" if layout.far_peers else "near"
    link = getattr(machine, name)
    for speedup in (1.0, 1.3):
        bandwidth = break_even_bandwidth(model, layout, machine, stock, ours, speedup)
        if 0 < bandwidth < INFINITE:
            even = replace(machine, **{name: replace(link, bandwidth=bandwidth)})
            steps = [predict(model, layout, even, method).step for method in (stock, ours)]
            assert steps[0] == pytest.approx(speedup * steps[1], rel=1e-6)
    message = break_even_message(model, layout, machine, stock, ours)
    own = stock.traffic[0].wires[0].mean_bytes
    pays = predict(model, layout, machine, ours).step < predict(model, layout, machine, stock).step
    assert pays == (message < own)


def test_a_fixed_time_per_message_does_not_pay_for_small_ones():
    layout = Layout(2, 2, 1)
    machine = machine_of(1e9, codecs={"rq": CodecSpeed(1e10, 1e10, 1e-3)})
    small, large = model_of(hidden=8, micro_batch=1), model_of(hidden=1024, micro_batch=64)
    for model, pays in ((small, False), (large, True)):
        stock, ours = stock_method(model, layout), method_of("x", birdmoe(), model, layout)
        steps = [predict(model, layout, machine, method).step for method in (ours, stock)]
        assert (steps[0] < steps[1]) == pays


@quick
@given(models, st.floats(1.0, 4.0))
def test_the_most_loaded_rank_decides(model, load):
    layout = Layout(8, 8, 1, load=load)
    machine = machine_of(codecs=FREE)
    uniform, aware = (
        predict(model, layout, machine, method_of("x", config, model, layout))
        for config in (
            birdmoe(8),
            birdmoe(8, moe_a2a_bit_policy="optimal", moe_a2a_min_bits=5),
        )
    )
    even = Layout(8, 8, 1)
    balanced = predict(model, even, machine, method_of("x", birdmoe(8), model, even))
    # Rows are whole, and segments padded.
    assert uniform.all_to_all == pytest.approx(load * balanced.all_to_all, rel=0.05)
    bits = max(5.0, 8 / load)
    row = model.hidden_size / 8 * 2
    relief = (row * bits + 8 + model.prob_bytes) / (row * 8 + 8 + model.prob_bytes)
    assert aware.all_to_all == pytest.approx(relief * uniform.all_to_all, rel=0.05)
    assert expert_flops(model, layout) == pytest.approx(load * expert_flops(model, even))


def test_lsh_saves_experts_work_and_adds_its_own():
    model, layout = model_of(), Layout(4, 4, 1)
    machine = machine_of()
    lsh = CompressionConfig(moe_a2a_compress="lsh", moe_lsh_target_rate=0.25)
    stock = predict(model, layout, machine, stock_method(model, layout))
    ours = predict(model, layout, machine, method_of("lsh", lsh, model, layout))
    assert ours.experts == pytest.approx(stock.experts / 4)
    assert ours.beside > 0 == stock.beside


def test_gradients_are_summed_in_nodes_first():
    model = model_of(vocab_size=1000)
    machine = Machine(1e12, 1e10, Link(8e9), Link(1e9), SLOW)
    alone = Layout(8, 1, 1)
    of_stock = stock_method(model, alone)
    between = predict(model, alone, machine, of_stock).gradients
    within = predict(model, Layout(8, 1, 8), machine, of_stock).gradients
    both = predict(model, Layout(8, 1, 4), machine, of_stock).gradients
    assert between == pytest.approx(8 * within)
    assert within < both < between
    hidden = predict(model, Layout(8, 1, 1, overlap_gradients=True), machine, of_stock)
    assert hidden.gradients < between


def test_recomputing_sends_the_forward_wires_again():
    layout, machine = Layout(4, 4, 1), machine_of()
    found = {
        what: predict(m, layout, machine, stock_method(m, layout))
        for what in ("none", "moe", "full")
        for m in [model_of(recompute=what)]
    }
    for what in ("moe", "full"):
        assert found[what].wire_bytes == pytest.approx(1.5 * found["none"].wire_bytes)
        assert found[what].experts == pytest.approx(4 / 3 * found["none"].experts)
    assert found["moe"].dense == found["none"].dense < found["full"].dense


def test_a_pipeline_waits_for_its_bubble():
    model, machine = replace(model_of(), num_microbatches=4), machine_of()
    one, two = (
        predict(model, layout, machine, stock_method(model, layout))
        for layout in (Layout(4, 4, 1), Layout(8, 4, 1, pipeline_parallel=2))
    )
    assert two.all_to_all == pytest.approx(one.all_to_all * 5 / 8)
    assert two.wire_bytes == pytest.approx(one.wire_bytes / 2)
