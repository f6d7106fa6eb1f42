"""Token files for T5: Megatron's own dataset makes samples of them that hold the whole text."""

import itertools
import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_comp.data.encoding import MAX_SEQUENCE_TOKENS, T5Encoder, split_lines
from megatron_moe_comp.data.errors import PreparationError
from megatron_moe_comp.data.options import PrepareOptions
from megatron_moe_comp.data.outputs import Outputs
from megatron_moe_comp.data.pipeline import prepare
from megatron_moe_comp.data.prepare import main
from megatron_moe_comp.data.t5_tokenizer import T5Tokenizer
from megatron_moe_comp.data.tokenizer import load_tokenizer
from tests.data.t5_models import TRAINED, train_like_released

with warnings.catch_warnings(action="ignore"):
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.t5_dataset import (
        T5MaskedWordPieceDataset,
        T5MaskedWordPieceDatasetConfig,
    )
    from megatron.core.datasets.utils import Split

SEQUENCE_LENGTH = 64
ENCODER = T5Encoder(TRAINED, "uint16")
PROCESSOR = load_tokenizer(TRAINED)
LINES = st.lists(st.text(st.sampled_from("ab (é\t\x0c\r")) | st.text(max_size=4)).map("\n".join)


@pytest.fixture
def prepared(code_directory, tmp_path):
    options = PrepareOptions(
        str(tmp_path / "t5"),
        (str(code_directory),),
        model="t5",
        vocab_size=460,
        workers=1,
        split=(80.0, 10.0, 10.0),
    )
    return prepare(options, lambda _: None)


@settings(deadline=None, max_examples=200)
@given(LINES)
def test_lines_are_the_text_and_none_is_blank(text):
    lines = split_lines(text)
    assert "".join(lines) == text
    assert all(line.strip() for line in lines) or len(lines) == 1
    assert all(
        line.endswith(tuple("\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")) for line in lines[:-1]
    )


def test_blank_lines_join_their_neighbours():
    assert split_lines("\n\na\n \n\n b\nc") == ["\n\na\n \n\n", " b\n", "c"]
    assert split_lines(" \n") == [" \n"]
    assert split_lines("") == []


@settings(deadline=None, max_examples=100)
@given(LINES)
def test_sequences_are_the_lines(text):
    text = text.replace("\u2581", " ")
    document = ENCODER.encode(text)
    assert document.ids.dtype == np.uint16
    assert PROCESSOR.decode(document.ids.tolist()) == text
    assert sum(document.sequence_lengths) == len(document.ids)
    assert all(0 < length <= MAX_SEQUENCE_TOKENS for length in document.sequence_lengths)
    assert len(document.sequence_lengths) >= len(split_lines(text))


def test_long_line_is_several_sequences():
    text = "zq" * MAX_SEQUENCE_TOKENS + "\nend"
    document = ENCODER.encode(text)
    assert document.sequence_lengths[:2] == [MAX_SEQUENCE_TOKENS] * 2
    assert PROCESSOR.decode(document.ids.tolist()) == text


def test_line_that_normalization_empties_is_no_sequence():
    document = T5Encoder(train_like_released(), "int32").encode("a thing\n\u200b\nthe theme")
    assert len(document.sequence_lengths) == 2


def test_index_has_documents_of_lines(prepared, code_directory):
    tokenizer = T5Tokenizer(str(prepared.outputs.tokenizer))
    found = []
    for split in ("train", "valid", "test"):
        dataset = IndexedDataset(str(prepared.outputs.data_path(split)))
        assert sum(dataset.sequence_lengths) == prepared.manifest.splits[split].tokens
        for begin, end in itertools.pairwise(dataset.document_indices):
            lines = [tokenizer.decode(dataset[i]) for i in range(begin, end)]
            assert len(lines) > 3
            found.append("".join(lines))
    texts = [path.read_bytes().decode() for path in code_directory.rglob("*.py")]
    assert sorted(found) == sorted(texts)


def restore(sample, tokenizer):
    """The tokens before spans were masked, from the encoder's input and the decoder's output."""
    spans, current = {}, None
    for id_ in itertools.takewhile(lambda id_: id_ != tokenizer.eos, sample["labels"].tolist()):
        if id_ in tokenizer.sentinel_ids:
            current = spans.setdefault(id_, [])
        else:
            current.append(id_)
    used = [id_ for id_ in sample["text_enc"].tolist() if id_ in spans]
    assert used == list(spans) == tokenizer.sentinel_ids[: len(spans)]
    unpadded = sample["text_enc"][sample["enc_mask"] == 1].tolist()
    return list(itertools.chain.from_iterable(spans.get(id_, [id_]) for id_ in unpadded))


def test_megatron_samples_hold_the_text(prepared, tmp_path, monkeypatch):
    tokenizer = T5Tokenizer(str(prepared.outputs.tokenizer))
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    path = str(prepared.outputs.data_path("train"))
    with warnings.catch_warnings(action="ignore"):
        config = T5MaskedWordPieceDatasetConfig(
            random_seed=3,
            sequence_length=SEQUENCE_LENGTH,
            sequence_length_decoder=32,
            blend=([path], None),
            split="1,0,0",
            path_to_cache=str(tmp_path / "cache"),
            tokenizer=tokenizer,
            masking_probability=0.15,
            short_sequence_probability=0.1,
            masking_max_ngram=10,
            masking_do_full_word=True,
            masking_do_permutation=False,
            masking_use_longer_ngrams=False,
            masking_use_geometric_distribution=True,
        )
        indexed = IndexedDataset(path)
        documents = np.arange(len(indexed.document_indices) - 1, dtype=np.int32)
        # Whole epochs are made until there are enough samples, so this is one.
        dataset = T5MaskedWordPieceDataset(indexed, path, documents, 1, Split.train, config)
    covered = np.zeros(len(indexed.sequence_lengths), int)
    assert len(dataset) > 20
    for index in range(len(dataset)):
        begin, end, length = dataset.sample_index[index]
        covered[begin:end] += 1
        tokens = np.concatenate([indexed[i] for i in range(begin, end)])
        sample = dataset[index]
        assert restore(sample, tokenizer) == tokens[:length].tolist()
        assert sample["text_dec"][0] == tokenizer.start_id
        assert sample["loss_mask"].sum() == np.count_nonzero(sample["labels"] > 0)
    # No document was left out.
    assert set(covered) == {1}
    assert sum(length > 512 for length in indexed.sequence_lengths) == 0


def test_choice_of_the_model_is_part_of_what_is_compared(prepared, code_directory):
    manifest = json.loads(prepared.outputs.manifest.read_text())
    assert manifest["fingerprint"]["model"] == "t5"
    assert manifest["end_of_document"] is None
    options = {"vocab_size": 460, "workers": 1, "split": (80.0, 10.0, 10.0)}
    given = (str(prepared.outputs.prefix), (str(code_directory),))
    assert prepare(PrepareOptions(*given, model="t5", **options)).reused
    messages = []
    assert not prepare(PrepareOptions(*given, **options), messages.append).reused
    assert messages[0].endswith("changed since last time: model")


def test_workers_change_nothing(prepared, code_directory, tmp_path, read_files, monkeypatch):
    monkeypatch.setattr("megatron_moe_comp.data.encoding.BATCH_CHARACTERS", 1)
    arguments = ["--model", "t5", "--input", str(code_directory), "--vocab-size", "460"]
    arguments += ["--split", "80,10,10", "--workers", "2"]
    assert main([*arguments, "--output-prefix", str(tmp_path / "two")]) == 0
    one, two = read_files(prepared.outputs.prefix), read_files(tmp_path / "two")
    del one["_manifest.json"], two["_manifest.json"]
    assert one == two


def test_given_tokenizer_must_have_what_t5_needs(code_directory, tmp_path, capsys):
    released = tmp_path / "spiece.model"
    released.write_bytes(train_like_released())
    arguments = ["--model", "t5", "--input", str(code_directory), "--workers", "1"]
    arguments += ["--output-prefix", str(tmp_path / "out"), "--tokenizer-model"]
    assert main([*arguments, str(released)]) == 2
    assert "no piece <extra_id_0> for masked spans: add them with python -m megatron_moe" in (
        capsys.readouterr().err
    )
    with pytest.raises(PreparationError, match="no piece <extra_id_0>"):
        prepare(PrepareOptions(str(tmp_path / "o"), model="t5", tokenizer_model=str(released)))
    complete = tmp_path / "t5.model"
    complete.write_bytes(TRAINED)
    assert main([*arguments, str(complete)]) == 0
    assert "end of document in the index alone" in capsys.readouterr().out
    assert Outputs(tmp_path / "out").tokenizer.read_bytes() == TRAINED
