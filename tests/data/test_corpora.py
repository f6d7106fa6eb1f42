import json
import os
import sysconfig
from pathlib import Path

import pytest

from megatron_moe_comp.data import corpora
from megatron_moe_comp.data.corpora import (
    DIRECTORY_EXTENSIONS,
    Document,
    Source,
    find_corpus,
    read_documents,
    standard_library,
)
from megatron_moe_comp.data.errors import PreparationError


def read(paths, json_key="text"):
    """The documents of files, and what was said of the bad ones."""
    bad = []
    sources = [Source(path, path.name) for path in paths]
    return list(read_documents(sources, json_key, lambda item: bad.append(str(item)))), bad


def test_standard_library_is_sorted_source_text():
    corpus = standard_library()
    names = [source.name for source in corpus.sources]
    assert {"argparse.py", "asyncio/events.py", "json/decoder.py"} <= set(names)
    assert names == [source.name for source in standard_library().sources]
    assert len(set(names)) == len(names)
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "dist-packages", "encodings"}
    assert not [name for name in names if "_sysconfigdata" in name or not name.endswith(".py")]
    root = Path(sysconfig.get_path("stdlib"))
    assert all(source.path == root / source.name for source in corpus.sources)


def test_standard_library_has_text_enough_and_no_bad_document():
    bad = []
    documents = list(read_documents(standard_library().sources, "text", bad.append))
    assert bad == []
    assert len(documents) > 300
    assert sum(document.size for document in documents) > 5_000_000


def test_missing_standard_library_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(PreparationError, match=r"no \.py files.*pass --input"):
        standard_library()


def test_directory_is_read_by_extension_without_hidden_files(tmp_path):
    for name in ("b.py", "a/x.txt", "a/y.png", ".hidden.py", ".git/z.py", "c.TXT", "d.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("text")
    corpus = find_corpus([str(tmp_path)], DIRECTORY_EXTENSIONS)
    assert [source.name for source in corpus.sources] == ["b.py", "c.TXT", "a/x.txt"]
    assert corpus.ignored_files == 2
    corpus = find_corpus([str(tmp_path)], [".png"])
    assert [source.name for source in corpus.sources] == ["a/y.png"]


def test_named_file_is_read_whatever_its_extension(tmp_path):
    path = tmp_path / "LICENSE"
    path.write_text("words")
    assert find_corpus([str(path)], DIRECTORY_EXTENSIONS).sources == (Source(path, "LICENSE"),)


def test_a_file_named_twice_is_read_once(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text")
    os.symlink(path, tmp_path / "b.txt")
    corpus = find_corpus([str(tmp_path), str(path)], DIRECTORY_EXTENSIONS)
    assert [source.name for source in corpus.sources] == ["a.txt"]


def test_input_that_is_no_text_is_refused(tmp_path):
    with pytest.raises(PreparationError, match=r"--input .*nowhere: does not exist"):
        find_corpus([str(tmp_path / "nowhere")], DIRECTORY_EXTENSIONS)
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    with pytest.raises(PreparationError, match=r"no file with one of.*pass --extensions"):
        find_corpus([str(tmp_path)], DIRECTORY_EXTENSIONS)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PreparationError, match="is not a regular file or directory"):
        find_corpus([str(tmp_path / "pipe")], DIRECTORY_EXTENSIONS)


def test_text_file_is_one_document_byte_for_byte(tmp_path):
    data = "\ufeffA\r\n\tb \0 é\u2028 end".encode()
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    documents, bad = read([path])
    assert bad == []
    assert documents == [Document("a.txt", data.decode(), len(data))]


def test_undecodable_text_is_named_with_its_byte(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 au lait")
    documents, bad = read([path])
    assert documents == []
    assert bad[0].startswith(f"{path}: byte 3 (0xe9) is not valid UTF-8")


def test_unreadable_file_is_named(tmp_path):
    path = tmp_path / "link.txt"
    path.symlink_to(tmp_path / "gone")
    corpus = find_corpus([str(tmp_path)], DIRECTORY_EXTENSIONS)
    bad = []
    assert list(read_documents(corpus.sources, "text", bad.append)) == []
    assert str(bad[0]) == f"{path}: cannot be read (No such file or directory)"


def test_too_long_document_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "MAX_DOCUMENT_BYTES", 10)
    text, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("x" * 11)
    lines.write_text('{"text": "xxxxxxxxxxx"}\n{"text": "xxxxxxxxxx"}\n')
    documents, bad = read([text, lines])
    assert [document.name for document in documents] == ["b.jsonl:2"]
    assert [item.split(": the document is longer")[0] for item in bad] == [
        str(text),
        f"{lines}:1",
    ]


def test_jsonl_is_a_document_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text, "id": 1}) for text in ("one", "zwei\n\t", "三\0")]
    path.write_bytes("\ufeff".encode() + ("\n".join(lines[:2]) + "\n\n" + lines[2]).encode())
    documents, bad = read([path])
    assert bad == []
    assert [(d.name, d.text) for d in documents] == [
        ("a.jsonl:1", "one"),
        ("a.jsonl:2", "zwei\n\t"),
        ("a.jsonl:3", ""),
        ("a.jsonl:4", "三\0"),
    ]
    assert documents[3].size == len("三\0".encode())


def test_jsonl_reads_the_key_it_is_told(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"text": "no", "content": "yes"}')
    assert read([path], "content")[0][0].text == "yes"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "unclosed', "the line is not JSON"),
        (b"plain words", "the line is not JSON"),
        (b"[" * 100_000, "the line is not JSON"),
        (b'["text"]', "the line is a JSON list, not an object"),
        (b'{"content": "x", "n": 1}', "no key 'text' (keys: 'content', 'n'): name the text's"),
        (b"{}", "no key 'text' (keys: none)"),
        (b'{"text": 5}', "the value of 'text' is a int, not a string"),
        (b'{"text": null}', "the value of 'text' is a NoneType, not a string"),
        (b'{"text": "ab\\ud800"}', "the value of 'text' has a lone surrogate at character 2"),
        (b'{"text": "\xff"}', "byte 27 (0xff) is not valid UTF-8"),
    ],
)
def test_bad_jsonl_line_is_named(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "too"}\n')
    documents, bad = read([path])
    assert [document.text for document in documents] == ["good", "too"]
    assert len(bad) == 1
    assert bad[0].startswith(f"{path}:2: {reason}")
