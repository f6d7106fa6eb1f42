import json
import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_moe_comp.data.errors import PreparationError
from megatron_moe_comp.data.t5_tokenizer import T5Tokenizer, main
from megatron_moe_comp.data.tokenizer import (
    T5,
    add_sentinels,
    load_tokenizer,
    sentinel,
    train_tokenizer,
)
from tests.data.t5_models import SOURCE, TRAINED, train_like_released

RELEASED = train_like_released()
PAIRED = [
    (load_tokenizer(model), load_tokenizer(add_sentinels(model, 100)))
    for model in (RELEASED, train_tokenizer([SOURCE], 360))
]
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\u2581"))
CODE = st.text(st.sampled_from(list(" \t\n\0abdefthms_()[],:<>=0+é字🙂\u00a0\u2028")))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("t5") / "tokenizer.model"
    path.write_bytes(TRAINED)
    return T5Tokenizer(str(path))


def test_ids_follow_the_convention(tokenizer):
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.start_id) == (0, 1, 0)
    processor = load_tokenizer(TRAINED)
    assert [processor.id_to_piece(id_) for id_ in range(4)] == ["<pad>", "</s>", "<unk>", "<0x00>"]
    assert processor.bos_id() == -1
    assert tokenizer.vocab_size == 460
    assert tokenizer.sentinel_ids == list(range(459, 359, -1))


def test_sentinels_of_a_released_model_are_numbered_downwards():
    """The released vocabulary has 32000 pieces and Hugging Face's <extra_id_0> is 32099."""
    size = load_tokenizer(RELEASED).get_piece_size()
    processor = load_tokenizer(add_sentinels(RELEASED, 100))
    assert processor.get_piece_size() == size + 100
    assert processor.piece_to_id("<extra_id_0>") == size + 99
    assert processor.piece_to_id("<extra_id_99>") == size
    ids = processor.encode("the <extra_id_0> of<extra_id_99> a thesis")
    assert size + 99 in ids
    assert size in ids


def test_sentinels_are_written_as_protobuf_writes_them():
    proto_module = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    before = proto_module.ModelProto.FromString(RELEASED)
    after = proto_module.ModelProto.FromString(add_sentinels(RELEASED, 3))
    for index in (2, 1, 0):
        before.pieces.add(piece=sentinel(index), score=0.0, type="USER_DEFINED")
    assert after == before


def test_present_sentinels_are_left():
    model = add_sentinels(RELEASED, 100)
    assert add_sentinels(model, 100) == model
    assert add_sentinels(TRAINED, 100) == TRAINED
    assert add_sentinels(RELEASED, 0) == RELEASED
    with pytest.raises(PreparationError, match="has 7 of the 100 pieces <extra_id_0> to"):
        add_sentinels(add_sentinels(RELEASED, 7), 100)


@settings(deadline=None, max_examples=200)
@given(TEXT | CODE)
@example("<extra_id_")
@example("<extra_id_100>")
@example("the\u200btheme \ufb01")
def test_sentinels_change_no_encoding_of_plain_text(text):
    for before, after in PAIRED:
        assert after.encode(text) == before.encode(text)


@settings(deadline=None, max_examples=200)
@given(st.lists(TEXT | CODE | st.integers(0, 99).map(sentinel), max_size=6).map("".join))
@example("</s><pad><unk><0x41>")
def test_text_comes_back_exactly(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([0, *ids, 0, 1, 5, 6, 1, 0]) == text
    assert tokenizer.decode(np.array([460, *ids, 511, 1])) == text
    # Text can end nothing and is no padding.
    assert not {tokenizer.pad_id, tokenizer.eos_id} & set(ids)
    assert all(type(id_) is int for id_ in ids)


def test_sentinels_in_text_are_one_piece(tokenizer):
    ids = tokenizer.encode("def <extra_id_0>(self):<extra_id_17>")
    assert ids.count(tokenizer.sentinel_ids[0]) == 1
    assert ids[-1] == tokenizer.sentinel_ids[17]


def test_batch_is_each_text(tokenizer):
    texts = [SOURCE, "", "<extra_id_3>", "other"]
    assert tokenizer.encode_batch(texts, 2) == [tokenizer.encode(text) for text in texts]


def test_dataset_can_use_it(tokenizer, tmp_path):
    """What Megatron's T5 and masked datasets read, by their own rules."""
    assert tokenizer.bos == tokenizer.pad == 0
    assert tokenizer.eos == 1
    assert tokenizer.additional_special_tokens_ids == tokenizer.sentinel_ids
    vocabulary = range(tokenizer.vocab_size)
    assert list(tokenizer.inv_vocab) == list(vocabulary)
    assert not {tokenizer.mask, tokenizer.cls, tokenizer.sep, -1} & set(vocabulary)
    assert len({tokenizer.mask, tokenizer.cls, tokenizer.sep}) == 3
    description = json.dumps({"tokenizer": tokenizer}, default=lambda obj: obj.unique_identifiers)
    copy, other = tmp_path / "copy.model", tmp_path / "other.model"
    copy.write_bytes(TRAINED)
    other.write_bytes(RELEASED)
    assert json.loads(description)["tokenizer"] == T5Tokenizer(str(copy)).unique_identifiers
    assert T5Tokenizer(str(other)).unique_identifiers != tokenizer.unique_identifiers


def test_no_piece_continues_a_word(tmp_path):
    path = tmp_path / "comments.model"
    path.write_bytes(train_tokenizer(["######## value\n## other\n" * 99], 400, T5))
    tokenizer = T5Tokenizer(str(path))
    assert load_tokenizer(path.read_bytes()).encode("##", out_type=str) == ["##"]
    assert not [piece for piece in tokenizer.inv_vocab.values() if piece.startswith("##")]


def test_megatron_reads_the_trained_model(tmp_path):
    with warnings.catch_warnings(action="ignore"):
        from megatron.core.tokenizers import MegatronTokenizer
    path = tmp_path / "tokenizer.model"
    path.write_bytes(TRAINED)
    tokenizer = MegatronTokenizer.from_pretrained(
        tokenizer_path=str(path), metadata_path={"library": "sentencepiece"}
    )
    assert (tokenizer.pad, tokenizer.eos, tokenizer.vocab_size) == (0, 1, 460)
    assert tokenizer.tokenize(SOURCE) == T5Tokenizer(str(path)).encode(SOURCE)


@pytest.mark.parametrize("vocab_size", [50, 100, 101, 250])
def test_too_small_vocab_size_is_refused_with_one_that_fits(vocab_size):
    with pytest.raises(PreparationError, match=f"--vocab-size {vocab_size}: the sp") as caught:
        train_tokenizer([SOURCE], vocab_size, T5)
    fitting = int(str(caught.value).split("--vocab-size ")[-1].split()[0])
    assert load_tokenizer(train_tokenizer([SOURCE], fitting, T5)).get_piece_size() == fitting


def test_model_without_what_t5_needs_is_refused(tmp_path):
    path = tmp_path / "some.model"
    for lacking, options in {
        "no end-of-sentence id": {"eos_id": -1, "pad_id": 3},
        "no padding id": {"eos_id": 1, "bos_id": 2, "pad_id": -1},
    }.items():
        import sentencepiece

        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([SOURCE]),
            model_prefix=str(tmp_path / "some"),
            vocab_size=30,
            max_sentence_length=10**5,
            minloglevel=2,
            hard_vocab_limit=False,
            **options,
        )
        with pytest.raises(ValueError, match=f"--tokenizer-model {path}.*{lacking}.*--model t5"):
            T5Tokenizer(str(path))
    with pytest.raises(ValueError, match="cannot be read"):
        T5Tokenizer(str(tmp_path / "none.model"))
    path.write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"not a SentencePiece model.*--model t5"):
        T5Tokenizer(str(path))
    path.write_bytes(RELEASED)
    assert T5Tokenizer(str(path)).sentinel_ids == []


def test_command_adds_sentinels(tmp_path, capsys):
    released, output = tmp_path / "spiece.model", tmp_path / "t5.model"
    released.write_bytes(RELEASED)
    assert main([str(released), str(output)]) == 0
    assert f"--tokenizer-model {output}" in capsys.readouterr().out
    assert output.read_bytes() == add_sentinels(RELEASED, 100)
    assert main([str(tmp_path / "none"), str(output)]) == 2
    assert "t5_tokenizer: error: --tokenizer-model" in capsys.readouterr().err
