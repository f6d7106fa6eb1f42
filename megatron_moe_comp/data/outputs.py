"""The files of one prefix: names, lock, manifest, and how they appear.

Files are built in ``PREFIX.partial/`` and renamed when all are complete, so no name ever holds half
a file. Before the first rename every old file and the manifest are removed, and the manifest is
written last: files under their names always come from one run, and a manifest means all are there.
"""

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from megatron_moe_comp.data.errors import PreparationError
from megatron_moe_comp.data.splits import SPLIT_NAMES


@dataclass(frozen=True)
class SplitStatistics:
    """What one split holds; ``tokens`` includes the end-of-document ids."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    unknown_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class AnyManifest:
    """What the files of a prefix were made from.

    ``fingerprint`` is every option and input that decides their content, ``files`` their names
    and sizes in bytes. A subclass adds what they hold, with ``splits``, each of its
    ``split_class``.
    """

    split_class: ClassVar[type]

    fingerprint: dict[str, Any]
    splits: dict[str, Any]
    files: dict[str, int] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """The text of the manifest file."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The manifest that :meth:`to_json` wrote; ValueError or TypeError for any other text."""
        fields = json.loads(text)
        if not isinstance(fields, dict) or not isinstance(fields.get("splits"), dict):
            raise ValueError("not a manifest")
        splits = {name: cls.split_class(**split) for name, split in fields.pop("splits").items()}
        return cls(splits=splits, **fields)


@dataclass(frozen=True, kw_only=True)
class Manifest(AnyManifest):
    """What token files were made from, and what they hold.

    ``end_of_document`` is the id after each document, None where only the index tells its end.
    """

    split_class = SplitStatistics

    splits: dict[str, SplitStatistics]
    vocab_size: int
    end_of_document: int | None
    token_dtype: str
    empty_documents: int
    ignored_files: int
    bad_documents: list[str]


@dataclass(frozen=True)
class Outputs:
    """The paths of one prefix, such as data/stdlib -> data/stdlib_train.bin."""

    prefix: Path

    def _named(self, ending: str) -> Path:
        return self.prefix.with_name(self.prefix.name + ending)

    @property
    def tokenizer(self) -> Path:
        """The SentencePiece model, for --tokenizer-model."""
        return self._named("_tokenizer.model")

    @property
    def manifest(self) -> Path:
        """The JSON file that says the others are complete."""
        return self._named("_manifest.json")

    @property
    def partial(self) -> Path:
        """The directory of an unfinished run."""
        return self._named(".partial")

    @property
    def cache(self) -> Path:
        """For --data-cache-path: Megatron's sample indices, which it never checks against data."""
        return self._named("_cache")

    @property
    def lock(self) -> Path:
        """The file a running preparation holds locked."""
        return self._named(".lock")

    def data_path(self, split: str) -> Path:
        """What Megatron's --train-data-path and the like take: the pair's path without ending."""
        return self._named(f"_{split}")

    def bin(self, split: str) -> Path:
        """The token ids of ``split``."""
        return self._named(f"_{split}.bin")

    def idx(self, split: str) -> Path:
        """The document lengths and positions of ``split``."""
        return self._named(f"_{split}.idx")

    def pairs(self, split: str) -> Path:
        """The pairs of texts of ``split``, one JSON object a line."""
        return self._named(f"_{split}.jsonl")

    def read_manifest[M: AnyManifest](self, kind: type[M] = Manifest) -> M | None:
        """The manifest, if it is of this kind and every file it lists has the size it says."""
        try:
            manifest = kind.from_json(self.manifest.read_text(encoding="utf-8"))
            sizes = {name: self.prefix.with_name(name).stat().st_size for name in manifest.files}
        except (OSError, ValueError, TypeError):
            return None
        return manifest if sizes == manifest.files else None

    @contextmanager
    def locked(self, log: Callable[[str], None]) -> Iterator[None]:
        """Hold the prefix for this process; waits while another one holds it.

        Raises:
            PreparationError: the directory cannot be created or written.
        """
        try:
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            lock = self.lock.open("a")
        except OSError as error:
            raise PreparationError(
                f"--output-prefix {self.prefix}: the directory {self.prefix.parent} cannot be "
                f"written ({error.strerror}): give a prefix in a directory you may write"
            ) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log(f"waiting for another preparation of {self.prefix}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def building(self) -> Iterator["Outputs"]:
        """The same names inside an empty ``partial`` directory, which is removed at the end."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir()
        try:
            yield Outputs(self.partial / self.prefix.name)
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)

    def publish[M: AnyManifest](self, built: "Outputs", manifest: M) -> M:
        """Replace what the prefix holds by the files ``built``; the manifest with their sizes.

        The caches go too: their indices would cut the new tokens at the old documents' places.
        """
        files = sorted(built.prefix.parent.iterdir())
        manifest = dataclasses.replace(
            manifest, files={path.name: path.stat().st_size for path in files}
        )
        built.manifest.write_text(manifest.to_json(), encoding="utf-8")
        self.manifest.unlink(missing_ok=True)
        shutil.rmtree(self.cache, ignore_errors=True)
        self.tokenizer.unlink(missing_ok=True)
        for split in SPLIT_NAMES:
            self.bin(split).unlink(missing_ok=True)
            self.idx(split).unlink(missing_ok=True)
            self.pairs(split).unlink(missing_ok=True)
            # Where Megatron keeps the indices without --data-cache-path.
            shutil.rmtree(self.data_path(split) / "cache", ignore_errors=True)
        for path in files:
            os.replace(path, self.prefix.with_name(path.name))
        os.replace(built.manifest, self.manifest)
        return manifest
