import json
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_comp.data.pairs.reader import read_pairs
from megatron_moe_comp.data.t5_tokenizer import T5Tokenizer
from tests.data.t5_models import TRAINED, train_like_released, write_pairs


def make_tokenizer(tmp_path, model):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model)
    return T5Tokenizer(str(path))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("pairs"), TRAINED)


TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40).filter(str.strip)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8), st.integers(2, 20))
def test_ids_are_those_of_the_texts_cut_before_the_end(tokenizer, tmp_path_factory, pairs, maximum):
    path = write_pairs(tmp_path_factory.getbasetemp() / "pairs.jsonl", pairs)
    read = read_pairs(path, tokenizer, maximum, 1000, long_lines="truncate")
    assert len(read) == len(pairs)
    for index, (text, target) in enumerate(pairs):
        input_ids, target_ids = read[index]
        assert input_ids.dtype == target_ids.dtype == np.int32
        assert input_ids.tolist() == [*tokenizer.encode(text)[: maximum - 1], 1]
        assert target_ids.tolist() == [*tokenizer.encode(target), 1]
        assert read.target_text(index) == target
    assert read[-1][1].tolist() == read[len(pairs) - 1][1].tolist()
    with pytest.raises(IndexError):
        read[len(pairs)]
    too_long = sum(len(tokenizer.encode(text)) + 1 > maximum for text, _ in pairs)
    assert len(read.remarks) == (too_long > 0)
    if too_long:
        assert read.remarks[0].startswith(f"{too_long} of {len(pairs)} lines of {path} have inputs")


def test_batches_join(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_moe_comp.data.pairs.reader._BATCH_LINES", 3)
    pairs = [(f"a {i}", f"target {i}") for i in range(10)]
    read = read_pairs(write_pairs(tmp_path / "p.jsonl", pairs), tokenizer, 50, 50)
    assert [tuple(map(tokenizer.decode, read[i])) for i in range(10)] == pairs
    assert read.remarks == []
    copy = pickle.loads(pickle.dumps(read))
    assert copy[9][0].tolist() == read[9][0].tolist()
    assert copy.target_text(9) == "target 9"


def test_blank_lines_marks_and_other_keys_do_not_matter(tokenizer, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"input": "a", "target": "b", "label": 1}\r\n\n  \n'
        b'{"target": "d", "input": "c"}'
    )
    read = read_pairs(path, tokenizer, 50, 50)
    assert [read.target_text(i) for i in range(len(read))] == ["b", "d"]
    assert tokenizer.decode(read[1][0]) == "c"


BAD_LINES = {
    b'{"input": "a", "target"': "not JSON",
    b"words": "not JSON",
    b"[" * 100_000: "not JSON",
    b'["a", "b"]': "a JSON list, not an object",
    b'{"target": "b"}': "no 'input'",
    b'{"input": "a"}': "no 'target'",
    b'{"input": 5, "target": "b"}': "'input' is a int, not a string",
    b'{"input": "a", "target": null}': "'target' is a NoneType, not a string",
    b'{"input": "", "target": "b"}': "'input' is empty",
    b'{"input": "a", "target": " \\n"}': "'target' is empty",
    b'{"input": "\xff", "target": "b"}': "byte 11 (0xff) is not UTF-8",
    b'{"input": "a", "target": "\\ud800"}': "'target' has a lone surrogate",
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items())
def test_bad_line_is_refused_or_left_out(tokenizer, tmp_path, line, reason):
    path = tmp_path / "p.jsonl"
    good = b'{"input": "a", "target": "b"}\n'
    path.write_bytes(good + b"\n" + line + b"\n" + good)
    with pytest.raises(ValueError, match="--bad-lines skip") as caught:
        read_pairs(path, tokenizer, 50, 50)
    assert str(caught.value).startswith(f"1 of 3 lines of {path} hold no pair: line 3: {reason}")
    read = read_pairs(path, tokenizer, 50, 50, bad_lines="skip")
    assert len(read) == 2
    assert read.target_text(1) == "b"
    assert len(read.remarks) == 1
    assert f"left out: line 3: {reason}" in read.remarks[0]


def test_text_that_the_tokenizer_drops_is_bad(tmp_path):
    tokenizer = make_tokenizer(tmp_path, train_like_released())
    path = write_pairs(tmp_path / "p.jsonl", [("a thing", "\u200b"), ("\u200b", "the")])
    with pytest.raises(ValueError, match="line 1: the tokenizer finds nothing in 'target'; line 2"):
        read_pairs(path, tokenizer, 50, 50)


def test_many_bad_lines_are_counted_and_the_first_named(tokenizer, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"input": "a", "target": "b"}\n' + "{}\n" * 12)
    with pytest.raises(ValueError, match="12 of 13 lines") as caught:
        read_pairs(path, tokenizer, 50, 50)
    assert "line 6: no 'input' and 7 more: correct them" in str(caught.value)


def test_long_lines_are_refused_or_cut(tokenizer, tmp_path):
    pairs = [("a", "b"), ("zq" * 20, "b"), ("a", "zq" * 10), ("zq" * 9, "zq" * 9)]
    path = write_pairs(tmp_path / "p.jsonl", pairs)
    with pytest.raises(ValueError, match="--long-lines truncate") as caught:
        read_pairs(path, tokenizer, 19, 12)
    assert str(caught.value).startswith(
        f"1 of 4 lines of {path} have inputs longer than --encoder-seq-length 19 "
        f"(line 2: 41 tokens); 2 of 4 lines of {path} have targets longer than "
        "--decoder-seq-length 12 (line 3: 21 tokens; line 4: 19 tokens): raise the option"
    )
    read = read_pairs(path, tokenizer, 19, 12, long_lines="truncate")
    assert [len(ids) for ids in read[1]] == [19, 2]
    assert [len(ids) for ids in read[2]] == [2, 12]
    # Exactly as long as allowed.
    assert [len(ids) for ids in read[3]] == [19, 12]
    assert all(ids[-1] == 1 for pair in map(read.__getitem__, range(4)) for ids in pair)
    assert [remark.rpartition(": ")[2] for remark in read.remarks] == ["truncated"] * 2
    assert read.target_text(2) == "zq" * 10


def test_what_cannot_be_used_is_refused(tokenizer, tmp_path):
    path = tmp_path / "p.jsonl"
    with pytest.raises(ValueError, match=r"p\.jsonl: cannot be read \(No such file"):
        read_pairs(path, tokenizer, 50, 50)
    path.write_text("\n\n")
    with pytest.raises(ValueError, match=r"holds no usable pair \(it is empty\)"):
        read_pairs(path, tokenizer, 50, 50)
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"no usable pair \(line 1: no 'input'\)"):
        read_pairs(path, tokenizer, 50, 50, bad_lines="skip")
    with pytest.raises(ValueError, match="--decoder-seq-length 1: must be 2 or more"):
        read_pairs(path, tokenizer, 50, 1)


def test_changed_file_is_noticed(tokenizer, tmp_path):
    path = write_pairs(tmp_path / "p.jsonl", [("a", "b")])
    read = read_pairs(path, tokenizer, 50, 50)
    path.write_text(json.dumps({"input": "a", "target": "c"}))
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match="was changed while in use"):
        read.target_text(0)
