"""Samples of pairs and the micro-batches that are left of them without most of their padding."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.utils import Split

from megatron_moe_comp.tasks.t5.batches import (
    SAMPLE_KEYS,
    PairsDataset,
    T5Batch,
    padded_sample,
    trimmed,
)

START, PAD = 90, 91


def pair(*lists):
    return tuple(np.array(ids, dtype=np.int32) for ids in lists)


def dataset(pairs, split=Split.train, num_samples=None, seed=3):
    return PairsDataset(
        pairs,
        split=split,
        num_samples=num_samples,
        encoder_length=6,
        decoder_length=5,
        start_id=START,
        pad_id=PAD,
        seed=seed,
    )


def test_a_sample_is_laid_out_for_teacher_forcing():
    sample = padded_sample(*pair([11, 12, 13, 1], [21, 22, 1]), 6, 5, START, PAD)
    assert {key: values.tolist() for key, values in sample.items()} == {
        "text_enc": [11, 12, 13, 1, PAD, PAD],
        "text_dec": [START, 21, 22, PAD, PAD],
        "labels": [21, 22, 1, PAD, PAD],
        "loss_mask": [1, 1, 1, 0, 0],
        "enc_mask": [1, 1, 1, 1, 0, 0],
    }
    assert tuple(sample) == SAMPLE_KEYS
    assert {values.dtype for values in sample.values()} == {np.dtype(np.int64)}


def test_the_longest_pair_has_no_padding():
    sample = padded_sample(*pair([11, 1], [21, 22, 1]), 2, 3, START, PAD)
    assert sample["text_enc"].tolist() == [11, 1]
    assert sample["text_dec"].tolist() == [START, 21, 22]
    assert sample["labels"].tolist() == [21, 22, 1]
    assert sample["loss_mask"].all()
    assert sample["enc_mask"].all()


def test_a_batch_names_what_it_holds():
    samples = [padded_sample(*pair(ids, [21, 1]), 3, 2, START, PAD) for ids in ([5, 1], [6, 7, 1])]
    batch = T5Batch.of(torch.utils.data.default_collate(samples))
    assert batch.encoder_tokens.tolist() == [[5, 1, PAD], [6, 7, 1]]
    assert batch.decoder_tokens.tolist() == [[START, 21]] * 2
    assert batch.labels.tolist() == [[21, 1]] * 2
    assert batch.encoder_mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.decoder_mask.tolist() == [[True, True]] * 2


PAIRS = [pair([number, 1], [number, number, 1]) for number in range(20)]


def numbers(samples, indices):
    """Returns which of PAIRS the samples at these indices are, input and target alike."""
    chosen = [samples[index] for index in indices]
    assert all(sample["text_enc"][0] == sample["labels"][0] for sample in chosen)
    return [int(sample["labels"][0]) for sample in chosen]


def test_each_pass_over_training_pairs_has_its_own_order():
    samples = dataset(PAIRS, num_samples=50)
    assert len(samples) == 50
    first, second = numbers(samples, range(20)), numbers(samples, range(20, 40))
    assert sorted(first) == sorted(second) == list(range(20))
    assert len({tuple(first), tuple(second), tuple(range(20))}) == 3
    # Workers and resumed runs read samples in any order.
    again = dataset(PAIRS, num_samples=1000)
    assert numbers(again, range(39, -1, -1)) == (first + second)[::-1]
    assert numbers(dataset(PAIRS, num_samples=50, seed=4), range(20)) != first
    assert samples[0]["split"] == Split.train.value


@pytest.mark.parametrize("split", [Split.valid, Split.test])
def test_evaluation_keeps_the_order_and_starts_over(split):
    samples = dataset(PAIRS, split, num_samples=50)
    assert numbers(samples, range(50)) == [*range(20), *range(20), *range(10)]
    assert samples[49]["split"] == split.value


@pytest.mark.parametrize(("num_samples", "length"), [(None, 20), (7, 20), (20, 20), (21, 21)])
def test_length(num_samples, length):
    assert len(dataset(PAIRS, Split.valid, num_samples)) == length


def lengths(longest):
    return st.lists(st.integers(0, longest), min_size=1, max_size=4)


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 2, 3, 4, 32]), st.data())
def test_nothing_but_padding_is_cut(encoder, decoder, parallel, data):
    sources = data.draw(lengths(encoder))
    targets = data.draw(st.lists(st.integers(1, decoder), min_size=len(sources)))[: len(sources)]
    samples = [
        padded_sample(
            *pair(range(100, 100 + source), range(200, 200 + target)), encoder, decoder, START, PAD
        )
        for source, target in zip(sources, targets, strict=True)
    ]
    batch = torch.utils.data.default_collate(samples)
    cut = trimmed(batch | {"split": torch.zeros(len(samples))}, parallel)
    assert tuple(cut) == SAMPLE_KEYS
    for keys, full, used in (
        (("text_enc", "enc_mask"), encoder, max(sources)),
        (("text_dec", "labels", "loss_mask"), decoder, max(targets)),
    ):
        (length,) = {cut[key].shape[1] for key in keys}
        assert used <= length
        # Less than one further multiple is left, and 3 needs every third of them.
        multiple = 48 if parallel == 3 else max(16, parallel)
        assert length == full if length % multiple else length < max(used, 1) + multiple
        for key in keys:
            assert cut[key].dtype == torch.int64
            assert torch.equal(cut[key], batch[key][:, :length])
            rest = batch[key][:, length:]
            assert (rest == (0 if "mask" in key else PAD)).all()


def test_lengths_are_not_rounded_beyond_those_of_the_samples():
    batch = torch.utils.data.default_collate(
        [padded_sample(*pair(range(17), range(3)), 20, 33, START, PAD)]
    )
    assert {key: values.shape[1] for key, values in trimmed(batch, 2).items()} == {
        "text_enc": 20,
        "text_dec": 16,
        "labels": 16,
        "loss_mask": 16,
        "enc_mask": 20,
    }
