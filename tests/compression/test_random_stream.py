from dataclasses import replace
from itertools import product

import torch

from megatron_moe_comp.compression.random_stream import (
    ForwardPass,
    ForwardPassCounter,
    TrainingStep,
    random_words,
)
from megatron_moe_comp.compression.wires import WIRES
from megatron_moe_comp.ops.philox import random_halves

STEP = TrainingStep(iteration=7, num_microbatches=3)


def test_no_two_messages_share_a_stream():
    streams = {
        ForwardPass(iteration, index, training).stream(seed=seed, rank=rank, layer=layer, wire=wire)
        for iteration, index, training, seed, rank, layer, wire in product(
            (0, 1),
            (0, 1, 65535),
            (True, False),
            (0, 2**32 - 1),
            (0, 1, 2**31 - 1),
            (1, 8191),
            WIRES,
        )
    }
    assert len(streams) == 2 * 3 * 2 * 2 * 3 * 2 * 4
    assert all(s.key < 2**63 and s.offset < 2**32 and s.stream < 2**32 for s in streams)


def indices(counter, step, count, **kwargs):
    return [counter.next(step, **kwargs).index for _ in range(count)]


def test_passes_are_numbered_within_an_iteration():
    counter = ForwardPassCounter()
    assert indices(counter, STEP, 3, training=True, with_grad=True) == [0, 1, 2]
    assert indices(counter, TrainingStep(8, 3), 1, training=True, with_grad=True) == [0]


def test_an_iteration_that_runs_again_repeats_its_numbers():
    counter = ForwardPassCounter()
    assert indices(counter, STEP, 6, training=True, with_grad=True) == [0, 1, 2, 0, 1, 2]


def test_recomputation_repeats_the_numbers_in_order():
    counter = ForwardPassCounter()
    assert indices(counter, STEP, 2, training=True, with_grad=False) == [0, 1]  # warm-up
    assert indices(counter, STEP, 1, training=True, with_grad=True) == [0]  # first backward
    assert indices(counter, STEP, 1, training=True, with_grad=False) == [2]  # steady state
    assert indices(counter, STEP, 2, training=True, with_grad=True) == [1, 2]  # cool-down
    assert indices(counter, STEP, 1, training=True, with_grad=False) == [0]


def test_evaluation_is_numbered_apart():
    counter = ForwardPassCounter()
    assert indices(counter, STEP, 2, training=True, with_grad=False) == [0, 1]
    assert indices(counter, STEP, 5, training=False, with_grad=False) == [0, 1, 2, 3, 4]
    assert indices(counter, STEP, 2, training=True, with_grad=True) == [0, 1]
    evaluation = counter.next(STEP, training=False, with_grad=False)
    assert evaluation.index == 5
    assert not evaluation.training


def test_a_new_iteration_forgets_what_was_never_recomputed():
    counter = ForwardPassCounter()
    indices(counter, STEP, 2, training=True, with_grad=False)
    assert indices(counter, TrainingStep(8, 3), 2, training=True, with_grad=True) == [0, 1]


def test_only_what_passes_again_is_recomputed():
    counter = ForwardPassCounter()

    def recomputed(count, **kwargs):
        return [counter.next(STEP, **kwargs).recomputed for _ in range(count)]

    assert recomputed(2, training=True, with_grad=False) == [False, False]
    assert recomputed(1, training=False, with_grad=False) == [False]
    assert recomputed(2, training=True, with_grad=True) == [True, True]
    assert recomputed(1, training=True, with_grad=True) == [False]
    assert recomputed(1, training=False, with_grad=True) == [False]


def test_recomputation_repeats_the_stream():
    first = ForwardPass(7, 1, True)
    place = {"seed": 1, "rank": 2, "layer": 3, "wire": "dispatch_fwd"}
    assert replace(first, recomputed=True).stream(**place) == first.stream(**place)


def test_random_words():
    place = {"seed": 1, "rank": 2, "layer": 3, "wire": "dispatch_fwd"}
    stream = ForwardPass(7, 1, True).stream(**place)
    cpu = torch.device("cpu")
    words = random_words(stream, 10_000, cpu)
    assert words.dtype == torch.int64
    assert torch.equal(words[:10], random_words(stream, 10, cpu))
    assert len(random_words(stream, 0, cpu)) == 0
    assert words.min() >= 0
    assert words.max() < 2**32
    mean = words.double().mean() / 2**32
    assert (mean - 0.5).abs() < 0.02
    assert len(words.unique()) > 9_990
    for other in (
        ForwardPass(8, 1, True).stream(**place),
        ForwardPass(7, 2, True).stream(**place),
        ForwardPass(7, 1, True).stream(**place | {"rank": 0}),
    ):
        assert (random_words(other, 10_000, cpu) == words).sum() < 10


def test_no_message_has_the_same_random_words():
    stream = ForwardPass(7, 1, True).stream(seed=1, rank=2, layer=3, wire="dispatch_fwd")
    words = random_words(stream, 64, torch.device("cpu"))
    place = {"key": stream.key, "offset": stream.offset, "stream": stream.stream}
    halves = random_halves(torch.arange(64), 64, **place).long().unflatten(2, (4, 2))
    of_message = halves[..., 0] | halves[..., 1] << 16
    assert not torch.isin(words, of_message).any()
