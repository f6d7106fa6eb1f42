import json
import os
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_comp.data import corpora
from megatron_moe_comp.data.errors import PreparationError
from megatron_moe_comp.data.outputs import Outputs
from megatron_moe_comp.data.pairs.function_tasks import cut_at_line, find_functions
from megatron_moe_comp.data.pairs.pipeline import PairsOptions, prepare_pairs
from megatron_moe_comp.data.pairs.reader import read_pairs
from megatron_moe_comp.data.prepare import main as prepare_main
from megatron_moe_comp.data.prepare_pairs import main
from megatron_moe_comp.data.t5_tokenizer import T5Tokenizer
from megatron_moe_comp.data.tokenizer import load_tokenizer
from tests.data.t5_models import TRAINED

PROCESSOR = load_tokenizer(TRAINED)
SPLITS = ("train", "valid", "test")
FILE = '''class Thing:
    @property
    def size_{i}(self):
        """Return the size, as size_{i}() does."""
        return self.size_{i} + {i}

    async def wait(self, seconds):
        def later(value):
            return value
        return later(seconds)
'''


@pytest.fixture
def python_files(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for i in range(20):
        (folder / f"module_{i}.py").write_text(FILE.replace("{i}", str(i)))
    return folder


def prepare_small(source, prefix, **options):
    defaults = {"task": "names", "vocab_size": 430, "max_input_tokens": 90}
    options = defaults | {"split": (80.0, 10.0, 10.0)} | options
    return prepare_pairs(PairsOptions(str(prefix), (str(source),), **options), lambda _: None)


def read_json_pairs(prefix, split):
    lines = Outputs(prefix).pairs(split).read_text().splitlines()
    return [(pair["input"], pair["target"]) for pair in map(json.loads, lines)]


def test_functions_are_found_with_their_own_lines():
    text = FILE.replace("{i}", "7").replace("\n", "\r\n") + "\x0c\nx = lambda: 0\ndef last(): pass"
    functions = {function.name: function.source for function in find_functions(text)}
    assert list(functions) == ["last", "size_7", "wait", "later"]
    assert functions["later"] == "def later(value):\n    return value"
    assert functions["last"] == "def last(): pass"
    assert functions["wait"].startswith("async def wait(self, seconds):\n    def later(value):\n")
    with pytest.raises(SyntaxError):
        find_functions("def broken(:")


@settings(deadline=None)
@given(st.lists(st.text(st.sampled_from("ab (é"), max_size=9), max_size=9), st.integers(1, 60))
def test_cut_keeps_whole_lines_that_fit(lines, maximum):
    text = "\n".join(lines)
    cut = cut_at_line(text, maximum, PROCESSOR)
    if cut is None:
        return
    assert len(PROCESSOR.encode(cut)) <= maximum
    assert "\n" in cut
    assert text.startswith(cut)
    assert not text[len(cut) :].partition("\n")[0].strip()


def test_cut_takes_all_that_fits():
    text = "a\nb\nc"
    by_line = sum(len(PROCESSOR.encode(line)) for line in ("a\n", "b\n", "c\n"))
    assert cut_at_line(text, by_line, PROCESSOR) == text
    assert cut_at_line(text, by_line - 1, PROCESSOR) == "a\nb"
    assert cut_at_line("abcdefgh" * 9, 10**6, PROCESSOR) is None


def test_pairs_are_divided_by_file_and_do_not_repeat(python_files, tmp_path):
    prefix = tmp_path / "out" / "pairs"
    manifest = prepare_small(python_files, prefix).manifest
    pairs = {split: read_json_pairs(prefix, split) for split in SPLITS}
    everything = [pair for split in SPLITS for pair in pairs[split]]
    names = Counter(target for _, target in everything)
    # The methods that are equal in all files are there once, in the training part.
    assert names.pop("wait") == names.pop("later") == 1
    assert {"wait", "later"} < {target for _, target in pairs["train"]}
    assert names == Counter(f"size_{i}" for i in range(20))
    assert len({text for text, _ in everything}) == len(everything) == 22
    assert [manifest.splits[split].files for split in SPLITS] == [16, 2, 2]
    assert [manifest.splits[split].pairs for split in SPLITS] == [18, 2, 2]
    assert (manifest.functions, manifest.repeated, manifest.too_long) == (60, 38, 0)
    assert manifest.splits["train"].frequent_targets[0][1] == 1
    for text, target in everything:
        assert text.startswith(("name: def <extra_id_0>(", "name: async def <extra_id_0>("))
        assert not re.search(rf"\b{target}\b", text)


def test_targets_of_builtins_follow_the_cut(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for i in range(20):
        used = f"def used_{i}(a):\n    b = len(a)\n" + f"    b += {i}\n" * 40 + "    return sum(b)"
        (source / f"module_{i}.py").write_text(f"{used}\n\ndef unused_{i}(a):\n    return a.len")
    prefix = tmp_path / "pairs"
    manifest = prepare_small(source, prefix, task="builtins").manifest
    everything = [pair for split in SPLITS for pair in read_json_pairs(prefix, split)]
    assert len(everything) == 20
    for text, target in everything:
        assert re.match(r"builtins: def used_\d+\(a\):\n    b = len\(a\)\n    b \+= ", text)
        assert target == "len"
    assert (manifest.functions, manifest.without_target, manifest.repeated) == (40, 20, 0)


def test_tokens_are_counted_as_they_are_read(python_files, tmp_path):
    prefix = tmp_path / "pairs"
    prepared = prepare_small(python_files, prefix)
    tokenizer = T5Tokenizer(str(prepared.outputs.tokenizer))
    assert tokenizer.vocab_size == 430
    assert len(tokenizer.sentinel_ids) == 100
    for split in SPLITS:
        statistics = prepared.manifest.splits[split]
        read = read_pairs(prepared.outputs.pairs(split), tokenizer, 90, statistics.longest_target)
        lengths = [tuple(map(len, read[i])) for i in range(len(read))]
        assert statistics.input_tokens == sum(length for length, _ in lengths)
        assert statistics.target_tokens == sum(length for _, length in lengths)
        assert all(tokenizer.sentinel_ids[0] in read[i][0] for i in range(len(read)))


def test_second_run_touches_nothing_and_a_changed_one_rebuilds(python_files, tmp_path):
    prefix = tmp_path / "pairs"
    first = prepare_small(python_files, prefix)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("pairs_*")}
    assert len(before) == 5
    second = prepare_small(python_files, prefix)
    assert second.reused
    assert second.manifest == first.manifest
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("pairs_*")} == before
    with pytest.raises(PreparationError, match="hold no function to ask about"):
        prepare_small(python_files, prefix, task="builtins")
    assert not prepare_small(python_files, prefix, split=(90.0, 10.0, 0.0)).reused
    assert not Outputs(prefix).pairs("test").exists()
    (python_files / "module_0.py").write_text("def other(a):\n    return a")
    third = prepare_small(python_files, prefix)
    assert not third.reused
    assert third.manifest.functions == 58
    Outputs(prefix).pairs("valid").unlink()
    assert not prepare_small(python_files, prefix).reused
    assert Outputs(prefix).pairs("valid").exists()


def test_death_before_the_end_leaves_no_mixture(python_files, tmp_path, monkeypatch):
    prefix = tmp_path / "pairs"
    prepare_small(python_files, prefix)
    replace = os.replace

    class Died(BaseException):
        pass

    def replace_one(source, target):
        monkeypatch.setattr(os, "replace", fail)
        replace(source, target)

    def fail(*_):
        raise Died

    monkeypatch.setattr(os, "replace", replace_one)
    with pytest.raises(Died):
        prepare_small(python_files, prefix, seed=5)
    assert len(list(tmp_path.glob("pairs_*"))) == 1
    monkeypatch.setattr(os, "replace", replace)
    assert not prepare_small(python_files, prefix, seed=5).reused
    assert len(list(tmp_path.glob("pairs_*"))) == 5


def test_token_files_and_pairs_of_one_prefix_replace_each_other(python_files, tmp_path):
    """They would share a tokenizer file that only one of them was made with."""
    prefix = tmp_path / "same"
    prepare_small(python_files, prefix)
    arguments = ["--input", str(python_files), "--output-prefix", str(prefix)]
    assert prepare_main([*arguments, "--vocab-size", "320", "--workers", "1"]) == 0
    assert not Outputs(prefix).pairs("train").exists()
    assert not prepare_small(python_files, prefix).reused
    assert not Outputs(prefix).bin("train").exists()


@pytest.mark.parametrize(("task", "fewest"), [("builtins", 250), ("names", 500)])
def test_slice_of_the_standard_library(task, fewest, tmp_path, monkeypatch, capsys):
    library = corpora.standard_library()
    part = [source for source in library.sources if source.name.startswith(("asyncio/", "json/"))]
    monkeypatch.setattr(corpora, "standard_library", lambda: corpora.Corpus(tuple(part)))
    prefix = tmp_path / "stdlib"
    arguments = ["--output-prefix", str(prefix), "--vocab-size", "1000", "--task", task]
    assert main(arguments) == 0
    summary = capsys.readouterr().out
    assert f"--tokenizer-model {prefix}_tokenizer.model" in summary
    assert f"--train-data-path {prefix}_train.jsonl --valid-data-path {prefix}_val" in summary
    assert "--encoder-seq-length 96 --decoder-seq-length " in summary
    longest = int(summary.split("--decoder-seq-length ")[1])
    assert longest % 8 == 0
    tokenizer = T5Tokenizer(f"{prefix}_tokenizer.model")
    counts = [len(read_pairs(f"{prefix}_{s}.jsonl", tokenizer, 96, longest)) for s in SPLITS]
    assert sum(counts) > fewest
    assert main(arguments) == 0
    assert capsys.readouterr().out.endswith(summary)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--split 0,50,50", "--split 0,50,50: the tokenizer is trained on the training files"),
        ("--split 50,50", "--split 50,50: 2 share(s), not 3"),
        ("--vocab-size 120", "--vocab-size 120: the special tokens"),
        ("--max-input-tokens 3", "--max-input-tokens 3: must be 8 or more"),
        ("--max-input-tokens 8", "hold no function to ask about"),
        ("--task builtins", "hold no function to ask about"),
        ("--input {tmp}/empty.py", "0 document(s) cannot fill 3 splits"),
        ("--input {tmp}/latin.py", "latin.py: byte 2 (0xff) is not valid UTF-8"),
        ("--input {tmp}/none", "none: does not exist"),
        ("--output-prefix {tmp}/", "not a directory but the beginning of file names"),
    ],
)
def test_what_cannot_be_is_refused(options, message, python_files, tmp_path, capsys):
    (tmp_path / "empty.py").write_text("x = 1")
    (tmp_path / "latin.py").write_bytes(b"# \xff")
    arguments = options.format(tmp=tmp_path).split()
    if "--input" not in arguments:
        arguments += ["--input", str(python_files)]
    if "--task" not in arguments:
        arguments += ["--task", "names"]
    if "--vocab-size" not in arguments:
        arguments += ["--vocab-size", "430"]
    if "--output-prefix" not in arguments:
        arguments += ["--output-prefix", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out_*"))


def test_files_that_are_no_python_are_left_out_and_named(python_files, tmp_path, capsys):
    (python_files / "broken.py").write_text("def broken(:")
    (python_files / "null.py").write_text("x = '\0'")
    arguments = ["--input", str(python_files), "--output-prefix", str(tmp_path / "out")]
    assert main([*arguments, "--vocab-size", "430", "--task", "names"]) == 0
    assert "files left out as no Python: broken.py, null.py" in capsys.readouterr().out


def test_input_changing_underneath_is_refused(python_files, tmp_path, monkeypatch):
    reading = corpora.read_documents

    def read_and_change(*args):
        yield from reading(*args)
        (python_files / "module_0.py").write_text("# other")

    monkeypatch.setattr(corpora, "read_documents", read_and_change)
    with pytest.raises(PreparationError, match="changed while it was read"):
        prepare_small(python_files, tmp_path / "out")
