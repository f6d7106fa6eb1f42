import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moe_comp.data import corpora
from megatron_moe_comp.data.corpora import DIRECTORY_EXTENSIONS, find_corpus, read_documents
from megatron_moe_comp.data.errors import PreparationError
from megatron_moe_comp.data.options import PrepareOptions
from megatron_moe_comp.data.outputs import Outputs
from megatron_moe_comp.data.pipeline import prepare
from megatron_moe_comp.data.prepare import main
from megatron_moe_comp.data.tokenizer import load_tokenizer, train_tokenizer

SPLITS = ("train", "valid", "test")


def prepare_small(source, prefix, **options):
    """Prepare ``source`` with a small tokenizer in this process."""
    options = {"vocab_size": 320, "workers": 1, "split": (80.0, 10.0, 10.0)} | options
    options = {key: value for key, value in options.items() if value is not None}
    messages = []
    prepared = prepare(PrepareOptions(str(prefix), (str(source),), **options), messages.append)
    return prepared, messages


def texts_of(source):
    corpus = find_corpus([str(source)], DIRECTORY_EXTENSIONS)
    return [document.text for document in read_documents(corpus.sources, "text", print)]


def test_documents_come_back_exactly_and_once(code_directory, tmp_path, read_split):
    prefix = tmp_path / "out" / "code"
    prepared, _ = prepare_small(code_directory, prefix)
    by_split = {name: read_split(prefix, name) for name in SPLITS}
    assert [len(by_split[name]) for name in SPLITS] == [16, 2, 2]
    everything = list(itertools.chain(*by_split.values()))
    assert sorted(everything) == sorted(texts_of(code_directory))
    assert len(set(everything)) == 20
    for name in SPLITS:
        statistics = prepared.manifest.splits[name]
        assert statistics.documents == len(by_split[name])
        assert statistics.bytes == sum(len(text.encode()) for text in by_split[name])
        assert statistics.tokens == Outputs(prefix).bin(name).stat().st_size // 2
        assert statistics.unknown_tokens == 0
    assert prepared.manifest.token_dtype == "uint16"
    assert prepared.manifest.end_of_document == 2
    assert not list(prefix.parent.glob("*.partial"))


def test_tokenizer_sees_the_training_documents_alone(code_directory, tmp_path, read_split):
    prefix = tmp_path / "code"
    prepare_small(code_directory, prefix)
    model = Outputs(prefix).tokenizer.read_bytes()
    assert model == train_tokenizer(read_split(prefix, "train"), 320)
    everything = [text for name in SPLITS for text in read_split(prefix, name)]
    assert model != train_tokenizer(everything, 320)


def test_files_do_not_depend_on_workers_or_place(code_directory, tmp_path, read_files, monkeypatch):
    # Batches of one document each, so that three workers have work to disorder.
    monkeypatch.setattr("megatron_moe_comp.data.encoding.BATCH_CHARACTERS", 1)
    prepare_small(code_directory, tmp_path / "one")
    prepare_small(code_directory, tmp_path / "elsewhere" / "three", workers=3)
    one = read_files(tmp_path / "one")
    assert sorted(one) == sorted(
        ["_manifest.json", "_tokenizer.model"]
        + [f"_{name}.{ending}" for name in SPLITS for ending in ("bin", "idx")]
    )
    three = read_files(tmp_path / "elsewhere" / "three")
    manifests = [json.loads(files.pop("_manifest.json")) for files in (one, three)]
    assert one == three
    for manifest in manifests:
        del manifest["files"]
    assert manifests[0] == manifests[1]


def test_seed_changes_the_split_and_nothing_else_does(code_directory, tmp_path, read_split):
    prepare_small(code_directory, tmp_path / "a")
    prepare_small(code_directory, tmp_path / "b", vocab_size=330)
    prepare_small(code_directory, tmp_path / "c", seed=5)
    first, same, other = (read_split(tmp_path / name, "test") for name in "abc")
    assert first == same
    assert first != other


def test_second_run_touches_nothing(code_directory, tmp_path):
    prefix = tmp_path / "code"
    first, _ = prepare_small(code_directory, prefix)
    assert not first.reused
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("code_*")}
    assert len(before) == 8
    second, messages = prepare_small(code_directory, prefix, workers=2)
    assert second.reused
    assert second.manifest == first.manifest
    assert messages == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("code_*")} == before


def test_sample_indices_of_other_tokens_are_cleared(code_directory, tmp_path):
    """Megatron would cut the new tokens at the old documents' places."""
    prefix = tmp_path / "code"
    prepared, _ = prepare_small(code_directory, prefix)
    # The latter is where they are without --data-cache-path.
    caches = prepared.outputs.cache, prepared.outputs.data_path("train") / "cache"
    for cache in caches:
        cache.mkdir(parents=True)
        (cache / "GPTDataset-train-sample_index.npy").touch()
    prepare_small(code_directory, prefix)
    assert all(cache.exists() for cache in caches)
    prepare_small(code_directory, prefix, vocab_size=310)
    assert not any(cache.exists() for cache in caches)


@pytest.mark.parametrize("change", ["options", "input", "file lost", "file cut", "no manifest"])
def test_what_changed_is_rebuilt(code_directory, tmp_path, read_files, change):
    prefix = tmp_path / "code"
    prepare_small(code_directory, prefix)
    before = read_files(prefix)
    options = {}
    if change == "options":
        options = {"vocab_size": 310, "split": (90.0, 0.0, 10.0)}
    elif change == "input":
        (code_directory / "new.py").write_text("def new():\n    return 'new'\n")
    elif change == "file lost":
        Outputs(prefix).idx("valid").unlink()
    elif change == "file cut":
        os.truncate(Outputs(prefix).bin("train"), 100)
    else:
        Outputs(prefix).manifest.write_text("{")
    prepared, messages = prepare_small(code_directory, prefix, **options)
    assert not prepared.reused
    after = read_files(prefix)
    if change == "options":
        assert messages[0].endswith("changed since last time: vocab_size, split")
        # No file of the split that was there and now has no share.
        assert "_valid.bin" in before
        assert "_valid.bin" not in after
        assert load_tokenizer(after["_tokenizer.model"]).get_piece_size() == 310
    elif change == "input":
        assert messages[0].endswith("changed since last time: inputs")
        assert len(after["_train.idx"]) > len(before["_train.idx"])
    else:
        assert after == before


@pytest.mark.parametrize("change", ["text added", "document added", "document lost"])
def test_input_changing_underneath_is_refused(code_directory, tmp_path, monkeypatch, change):
    reading = corpora.read_documents
    jsonl = code_directory / "some.jsonl"
    jsonl.write_text('{"text": "words"}\n')

    def read_and_change(*args, **kwargs):
        yield from reading(*args, **kwargs)
        if change == "text added":
            (code_directory / "package_0" / "module_0.py").write_text("# other")
        elif change == "document added":
            jsonl.write_text('{"text": "words"}\n' * 2)
        else:
            jsonl.unlink(missing_ok=True)

    monkeypatch.setattr(corpora, "read_documents", read_and_change)
    with pytest.raises(PreparationError, match="changed while it was read"):
        prepare_small(code_directory, tmp_path / "code")
    assert not list(tmp_path.glob("code_*"))


def test_jsonl_and_directories_mix(code_directory, tmp_path, read_split):
    jsonl = tmp_path / "more.jsonl"
    lines = [f"line {i}\twith\0 é\n" for i in range(10)]
    jsonl.write_text("".join(json.dumps({"body": line}) + "\n" for line in [*lines, "", " \n"]))
    prefix = tmp_path / "mixed"
    prepared = prepare(
        PrepareOptions(
            str(prefix), (str(code_directory), str(jsonl)), vocab_size=320, json_key="body"
        )
    )
    everything = [text for name in SPLITS for text in read_split(prefix, name)]
    assert sorted(everything) == sorted([*texts_of(code_directory), *lines])
    assert prepared.manifest.empty_documents == 2


def test_existing_tokenizer_is_used_and_copied(code_directory, tmp_path, read_split):
    model = train_tokenizer(["only these words: " * 9], 290)
    path = tmp_path / "given.model"
    path.write_bytes(model)
    prefix = tmp_path / "code"
    given = {"tokenizer_model": str(path), "vocab_size": None}
    prepare_small(code_directory, prefix, **given, split=(0.0, 0.0, 100.0))
    assert Outputs(prefix).tokenizer.read_bytes() == model
    assert sorted(read_split(prefix, "test")) == sorted(texts_of(code_directory))
    assert not Outputs(prefix).bin("train").exists()
    # The content decides, not the path.
    path.write_bytes(train_tokenizer(["quite other words: " * 9], 290))
    prepared, messages = prepare_small(code_directory, prefix, **given, split=(0.0, 0.0, 100.0))
    assert not prepared.reused
    assert messages[0].endswith("changed since last time: tokenizer_model")


def test_tokenizer_of_the_prefix_itself_is_not_replaced(code_directory, tmp_path, read_files):
    prefix = tmp_path / "code"
    prepare_small(code_directory, prefix)
    before = read_files(prefix)
    own = {"tokenizer_model": f"{prefix}_tokenizer.model", "vocab_size": None}
    with pytest.raises(PreparationError, match="is itself a file of --output-prefix"):
        prepare_small(code_directory, prefix, **own)
    assert read_files(prefix) == before


def test_bad_input_is_skipped_counted_and_listed(code_directory, tmp_path, capsys):
    (code_directory / "latin.py").write_bytes(b"# caf\xe9\n")
    (code_directory / "some.jsonl").write_text('{"text": "fine"}\n{"txt": "not"}\nnot\n')
    arguments = [
        *("--input", str(code_directory), "--output-prefix", str(tmp_path / "code")),
        *("--vocab-size", "320", "--workers", "1"),
    ]
    assert main(arguments) == 2
    assert "latin.py: byte 5 (0xe9)" in capsys.readouterr().err
    assert main([*arguments, "--skip-bad-input"]) == 0
    output = capsys.readouterr()
    assert "bad documents left out: 3" in output.out
    for place in ("latin.py: byte 5", "some.jsonl:2: no key", "some.jsonl:3: the line is not"):
        assert place in output.err
    manifest = Outputs(tmp_path / "code").read_manifest()
    assert len(manifest.bad_documents) == 3
    assert sum(split.documents for split in manifest.splits.values()) == 21


def test_slice_of_the_standard_library(tmp_path, monkeypatch, capsys, read_split):
    library = corpora.standard_library()
    part = [source for source in library.sources if source.name.startswith(("asyncio/", "json/"))]
    monkeypatch.setattr(corpora, "standard_library", lambda: corpora.Corpus(tuple(part)))
    prefix = tmp_path / "stdlib"
    assert main(["--output-prefix", str(prefix), "--vocab-size", "1024"]) == 0
    summary = capsys.readouterr().out
    assert f"--tokenizer-model {prefix}_tokenizer.model" in summary
    assert f"--train-data-path {prefix}_train --valid-data-path {prefix}_valid" in summary
    documents, size, tokens, ratio = (
        float(part.replace(",", ""))
        for part in re.search(r"train +(\S+) +(\S+) +(\S+) +(\S+)", summary).groups()
    )
    assert documents == len(read_split(prefix, "train"))
    assert ratio == pytest.approx(size / tokens, abs=0.01)
    assert ratio > 2.5
    texts = {source.path.read_bytes().decode() for source in part}
    assert set(read_split(prefix, "valid")) | set(read_split(prefix, "test")) < texts


def good_input(tmp_path: Path) -> str:
    path = tmp_path / "good.jsonl"
    path.write_text('{"text": "some words to learn from"}\n' * 10)
    return str(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--workers 0", "--workers 0: must be 1 or more"),
        ("--vocab-size 0", "--vocab-size 0: must be 1 or more"),
        ("--vocab-size 99999", "--vocab-size 99999: the training text fills only"),
        ("--vocab-size 100", "--vocab-size 100: the special tokens"),
        ("--split 50,50,50", "--split 50,50,50: the shares sum to 150, not 100"),
        ("--split 110,-5,-5", "--split 110,-5,-5: every share must be 0 or more"),
        ("--split 0,50,50", "--split 0,50,50: the tokenizer is trained on the training documents"),
        ("--input {tmp}/one.txt", "--split 90,5,5: 1 document(s) cannot fill 3 splits"),
        ("--input {tmp}/none.txt", "none.txt: does not exist"),
        ("--input {tmp}/empty.txt", "the input holds no text: 1 empty and 0 bad documents"),
        ("--input {tmp}/latin.txt", "latin.txt: byte 2 (0xff) is not valid UTF-8"),
        ("--input {tmp}/bad.jsonl", "bad.jsonl:2: no key 'text' (keys: 'txt')"),
        ("--json-key body", "good.jsonl:1: no key 'body' (keys: 'text')"),
        ("--tokenizer-model {tmp}/one.txt", "one.txt: not a SentencePiece model"),
        ("--tokenizer-model {tmp}/none", "none: cannot be read (No such file or directory)"),
        ("--tokenizer-model x --vocab-size 9", "--vocab-size 9: has no effect on the existing"),
        ("--output-prefix {tmp}/one.txt/x", "one.txt cannot be written (File exists)"),
        ("--output-prefix /proc/none/x", "--output-prefix /proc/none/x: the directory /proc/none"),
        ("--output-prefix {tmp}/", "not a directory but the beginning of file names"),
    ],
)
def test_what_cannot_be_is_refused_on_the_command_line(options, message, tmp_path, capsys):
    (tmp_path / "one.txt").write_text("words")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"ab\xff")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"txt": "y"}\n')
    arguments = options.format(tmp=tmp_path).split()
    if "--input" not in arguments:
        arguments += ["--input", good_input(tmp_path)]
    if "--output-prefix" not in arguments:
        arguments += ["--output-prefix", str(tmp_path / "out")]
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    errors = [line for line in output.err.splitlines() if line.startswith("prepare: error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not list(tmp_path.glob("out_*"))
    assert not list(tmp_path.glob("*.partial"))


def test_command_fails_without_a_traceback_and_without_torch(tmp_path):
    program = (
        "import sys\nfrom megatron_moe_comp.data.prepare import main\nstatus = main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules\nsys.exit(status)"
    )
    arguments = ["--input", good_input(tmp_path), "--output-prefix", str(tmp_path / "o")]
    run = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--vocab-size", "9999"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("prepare: error: --vocab-size 9999")
    assert "Traceback" not in run.stderr


def test_full_disk_is_reported(code_directory, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device", "some.bin")

    monkeypatch.setattr("megatron_moe_comp.data.pipeline._write_token_files", fail)
    arguments = ["--input", str(code_directory), "--output-prefix", str(tmp_path / "code")]
    assert main([*arguments, "--vocab-size", "320"]) == 1
    assert "prepare: error: [Errno 28] No space left on device: 'some.bin'" in (
        capsys.readouterr().err
    )
    assert not list(tmp_path.glob("code_*"))
    assert not list(tmp_path.glob("*.partial"))
