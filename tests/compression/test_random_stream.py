from itertools import product

from megatron_moe_comp.compression.random_stream import (
    ForwardPass,
    ForwardPassCounter,
    TrainingStep,
)
from megatron_moe_comp.config import WIRES

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
