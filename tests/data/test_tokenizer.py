import itertools
import warnings

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_moe_comp.data.errors import PreparationError
from megatron_moe_comp.data.tokenizer import (
    WINDOW_CHARACTERS,
    load_tokenizer,
    read_tokenizer,
    sample_windows,
    train_tokenizer,
)

with warnings.catch_warnings(action="ignore"):
    from megatron.core.tokenizers import MegatronTokenizer

SOURCE = "class Thing:\n\tdef method(self, a):\n        return [a,  a + 1]\n\n" * 20
MODEL = train_tokenizer([SOURCE], 300)
PROCESSOR = load_tokenizer(MODEL)

# All that UTF-8 can hold but U+2581, which is SentencePiece's sign for a space.
UNICODE_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\u2581"))
CODE_LIKE_TEXT = st.text(st.sampled_from(list(" \t\n\r\0abdefs_()[],.:=+é字🙂\ufeff\u00a0\u2028")))


@settings(deadline=None, max_examples=300)
@given(UNICODE_TEXT | CODE_LIKE_TEXT)
@example("\0")
@example("  leading and trailing  \n")
@example("<s></s><unk><pad><0x41>")
@example("\u2585 ⁇ \ufffd")
def test_text_comes_back_exactly(text):
    ids = PROCESSOR.encode(text)
    assert PROCESSOR.decode(ids) == text
    # No special token but the bytes: text cannot end a document.
    assert all(id_ >= 4 for id_ in ids)


def test_only_the_space_sign_does_not_come_back():
    assert PROCESSOR.decode(PROCESSOR.encode("a\u2581b")) == "a b"


def test_same_text_gives_the_same_bytes():
    assert train_tokenizer([SOURCE], 300) == MODEL
    assert train_tokenizer([SOURCE + "different " * 50], 300) != MODEL


def test_indentation_and_line_ends_are_pieces():
    pieces = PROCESSOR.encode("        return [a]\n\n", out_type=str)
    assert pieces[:2] == ["▁▁▁▁", "▁▁▁▁"]
    assert ":\n" in load_tokenizer(train_tokenizer([SOURCE], 330)).encode("if x:\n", out_type=str)


def test_text_begins_without_a_space_of_the_tokenizer():
    pieces = PROCESSOR.encode("class", out_type=str)
    assert "".join(pieces) == "class"


def test_megatron_reads_the_model(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(MODEL)
    tokenizer = MegatronTokenizer.from_pretrained(
        tokenizer_path=str(path),
        metadata_path={"library": "sentencepiece"},
        chat_template=None,
        ignore_extra_whitespaces=True,
        legacy=False,
        special_tokens=None,
    )
    assert (tokenizer.unk, tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 1, 2, 3)
    assert tokenizer.eod == tokenizer.eos
    assert tokenizer.vocab_size == 300
    assert tokenizer.tokenize(SOURCE) == PROCESSOR.encode(SOURCE)
    assert tokenizer.detokenize(tokenizer.tokenize(SOURCE)) == SOURCE


def test_nul_does_not_cost_the_rest_of_its_window():
    assert train_tokenizer(sample_windows([SOURCE + "\0"], len(SOURCE) + 1), 300) == MODEL


@pytest.mark.parametrize(
    ("vocab_size", "reason"),
    [
        (10**6, r"--vocab-size 1000000: the training text fills only (\d+): pass --vocab-size"),
        (200, r"--vocab-size 200: the special tokens, .* need (\d+): pass --vocab-size"),
    ],
)
def test_unfit_vocab_size_is_refused_with_one_that_fits(vocab_size, reason):
    with pytest.raises(PreparationError, match=reason) as caught:
        train_tokenizer([SOURCE], vocab_size)
    fitting = int(str(caught.value).split("--vocab-size ")[-1].split()[0])
    assert load_tokenizer(train_tokenizer([SOURCE], fitting)).get_piece_size() == fitting


def test_no_text_is_refused():
    for windows in ([], ["\n"]):
        with pytest.raises(PreparationError, match="no text to train a tokenizer on"):
            train_tokenizer(windows, 300)


def test_bad_model_files_are_refused(tmp_path):
    for content in (b"", b"not a model", bytes(100)):
        path = tmp_path / "some.model"
        path.write_bytes(content)
        with pytest.raises(PreparationError, match=f"{path}: not a SentencePiece model"):
            read_tokenizer(path)
    with pytest.raises(PreparationError, match=r"cannot be read \(No such file"):
        read_tokenizer(tmp_path / "none.model")


def test_model_without_an_end_is_refused(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([SOURCE]),
        model_prefix=str(tmp_path / "m"),
        vocab_size=30,
        eos_id=-1,
        max_sentence_length=10**5,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    with pytest.raises(PreparationError, match="no end-of-sentence id"):
        read_tokenizer(tmp_path / "m.model")


def test_all_text_is_sampled_within_the_budget():
    texts = ["a" * 10, "", "b" * (2 * WINDOW_CHARACTERS + 5)]
    total = sum(map(len, texts))
    assert "".join(sample_windows(texts, total)) == "".join(texts)


@pytest.mark.parametrize("length", [100, 3 * WINDOW_CHARACTERS])
def test_sample_keeps_the_budget_and_is_spread(length):
    texts = [f"{i:04d}" * (length // 4) for i in range(520)]
    budget = 520 * length // 4
    sample = list(sample_windows(texts, 520 * length, budget))
    assert sample == list(sample_windows(texts, 520 * length, budget))
    assert abs(sum(map(len, sample)) - budget) < 2 * min(length, WINDOW_CHARACTERS)
    chosen = [int(window[:4]) for window in sample]
    gaps = [after - before for before, after in itertools.pairwise([0, *chosen, 519])]
    assert max(gaps) <= 5
