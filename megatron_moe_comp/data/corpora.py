"""Where documents come from: the standard library's source text, text files, JSONL files.

A source is one file. A text file is one document; a JSONL file holds one document a line.
Sources are listed in a fixed order (inputs as given, directories sorted), so that the same
files give the same documents in the same order on every run.
"""

import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_moe_comp.data.errors import PreparationError

JSONL_EXTENSIONS = frozenset({".jsonl", ".json"})

# Read in directories unless --extensions says otherwise. Without .json: in a directory those are
# mostly configuration, not one object a line.
# fmt: off
DIRECTORY_EXTENSIONS = (
    ".txt", ".text", ".md", ".rst", ".tex", ".jsonl",
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh",
    ".java", ".js", ".ts", ".go", ".rs", ".rb", ".sh",
    ".html", ".css", ".xml", ".yaml", ".yml", ".toml", ".sql",
)
# fmt: on

# SentencePiece takes about 50 bytes of memory for each byte of one text.
MAX_DOCUMENT_BYTES = 64 * 2**20

# The tests are left out because many distributions do not install them, encodings because its
# files are generated character tables; build data and local hooks differ between machines.
_STDLIB_EXCLUDED_DIRECTORIES = frozenset(
    {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}
)
_STDLIB_EXCLUDED_FILES = frozenset({"sitecustomize.py", "usercustomize.py"})
_STDLIB_BUILD_PREFIXES = ("config-", "_sysconfigdata")


@dataclass(frozen=True)
class Source:
    """One file of a corpus.

    ``name`` is the path below the input it was found in, with forward slashes: it decides the
    document's split and does not change when the corpus is moved.
    """

    path: Path
    name: str

    @property
    def is_jsonl(self) -> bool:
        """Whether each line is a document, by the file's extension."""
        return self.path.suffix.lower() in JSONL_EXTENSIONS


@dataclass(frozen=True)
class Corpus:
    """The files to read, and how many files of the directories were left for their extension."""

    sources: tuple[Source, ...]
    ignored_files: int = 0


@dataclass(frozen=True)
class Document:
    """One text with the name its split is decided by; ``size`` is its length in UTF-8 bytes."""

    name: str
    text: str
    size: int


@dataclass(frozen=True)
class BadDocument:
    """What could not be read: ``place`` is FILE or FILE:LINE."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def standard_library() -> Corpus:
    """The .py files of the running interpreter's standard library.

    Raises:
        PreparationError: this Python was installed without its source text.
    """
    root = Path(sysconfig.get_path("stdlib"))
    sources = tuple(
        Source(path, path.relative_to(root).as_posix())
        for path in _walk(root, keep_directory=_is_library_directory)
        if path.suffix == ".py"
        and path.name not in _STDLIB_EXCLUDED_FILES
        and not path.name.startswith(_STDLIB_BUILD_PREFIXES)
    )
    if not sources:
        raise PreparationError(
            "the running Python's standard library has no .py files, and no --input was given: "
            "pass --input with text of your own, or use a Python installed with its source"
        )
    return Corpus(sources)


def find_corpus(inputs: Iterable[str], extensions: Iterable[str]) -> Corpus:
    """The files that ``inputs`` (files and directories) name, each file once.

    A directory is read recursively; hidden files and directories are skipped, as are files whose
    extension is not in ``extensions``.

    Raises:
        PreparationError: an input does not exist, is no regular file or directory, or holds no
            file to read.
    """
    wanted = frozenset(extension.lower() for extension in extensions)
    by_real_path: dict[str, Source] = {}
    ignored_files = 0
    for given in inputs:
        root = Path(given)
        if root.is_file():
            found = [Source(root, root.name)]
        elif root.is_dir():
            paths = list(_walk(root, keep_directory=_is_visible))
            found = [
                Source(path, path.relative_to(root).as_posix())
                for path in paths
                if path.suffix.lower() in wanted
            ]
            ignored_files += len(paths) - len(found)
            if not found:
                raise PreparationError(
                    f"--input {given}: the directory has no file with one of the extensions "
                    f"{' '.join(sorted(wanted))}: pass --extensions with those of your files"
                )
        else:
            state = "is not a regular file or directory" if root.exists() else "does not exist"
            raise PreparationError(f"--input {given}: {state}: give text or JSONL files")
        for source in found:
            by_real_path.setdefault(os.path.realpath(source.path), source)
    return Corpus(tuple(by_real_path.values()), ignored_files)


def read_documents(
    sources: Iterable[Source], json_key: str, on_bad: Callable[[BadDocument], None]
) -> Iterator[Document]:
    """The documents of ``sources`` in order; ``on_bad`` is told of each that cannot be read."""
    for source in sources:
        try:
            items = _read_jsonl(source, json_key) if source.is_jsonl else _read_text(source)
            for item in items:
                if isinstance(item, BadDocument):
                    on_bad(item)
                else:
                    yield item
        except OSError as error:
            on_bad(BadDocument(str(source.path), f"cannot be read ({error.strerror})"))


def _is_visible(name: str) -> bool:
    return not name.startswith(".")


def _is_library_directory(name: str) -> bool:
    return name not in _STDLIB_EXCLUDED_DIRECTORIES and not name.startswith(_STDLIB_BUILD_PREFIXES)


def _walk(root: Path, keep_directory: Callable[[str], bool]) -> Iterator[Path]:
    """The visible files below ``root``, sorted; a dangling link is listed, a socket is not."""

    def refuse(error: OSError) -> None:
        raise PreparationError(
            f"the directory {error.filename} cannot be listed ({error.strerror}): "
            "make it readable, or give another --input"
        )

    for folder, directories, files in os.walk(root, onerror=refuse):
        directories[:] = sorted(filter(keep_directory, directories))
        for name in sorted(filter(_is_visible, files)):
            path = Path(folder, name)
            if path.is_file() or path.is_symlink():
                yield path


def _read_text(source: Source) -> Iterator[Document | BadDocument]:
    with source.path.open("rb") as stream:
        # One byte more than allowed tells a document that is too long without reading it all.
        data = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        yield BadDocument(str(source.path), _TOO_LONG)
        return
    try:
        yield Document(source.name, data.decode("utf-8"), len(data))
    except UnicodeDecodeError as error:
        yield BadDocument(str(source.path), _describe_undecodable(error, 0))


def _read_jsonl(source: Source, json_key: str) -> Iterator[Document | BadDocument]:
    offset = 0
    with source.path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            place = f"{source.path}:{number}"
            try:
                text = _parse_line(line, json_key, offset)
                size = len(text.encode("utf-8"))
            except UnicodeEncodeError as error:
                reason = f"the value of {json_key!r} has a lone surrogate at character"
                yield BadDocument(place, f"{reason} {error.start}, which is not valid Unicode text")
            except PreparationError as error:
                yield BadDocument(place, str(error))
            else:
                if size > MAX_DOCUMENT_BYTES:
                    yield BadDocument(place, _TOO_LONG)
                else:
                    yield Document(f"{source.name}:{number}", text, size)
            offset += len(line)


_TOO_LONG = (
    f"the document is longer than {MAX_DOCUMENT_BYTES >> 20} MiB: divide it, for instance into "
    "lines of a JSONL file"
)


def _parse_line(line: bytes, json_key: str, offset: int) -> str:
    """The text of one JSONL line that begins at byte ``offset`` of its file; "" if it is blank."""
    try:
        decoded = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PreparationError(_describe_undecodable(error, offset)) from None
    if offset == 0:
        decoded = decoded.removeprefix("\ufeff")
    if not decoded.strip():
        return ""
    try:
        value = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        raise PreparationError(f"the line is not JSON ({error}): write one object a line") from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise PreparationError(f"the line is a JSON {kind}, not an object: write one object a line")
    if json_key not in value:
        keys = ", ".join(map(repr, value)) or "none"
        raise PreparationError(f"no key {json_key!r} (keys: {keys}): name the text's by --json-key")
    if not isinstance(value[json_key], str):
        kind = type(value[json_key]).__name__
        raise PreparationError(f"the value of {json_key!r} is a {kind}, not a string")
    return value[json_key]


def _describe_undecodable(error: UnicodeDecodeError, offset: int) -> str:
    byte = error.object[error.start]
    return (
        f"byte {offset + error.start} (0x{byte:02x}) is not valid UTF-8 ({error.reason}): "
        "convert the file to UTF-8"
    )
