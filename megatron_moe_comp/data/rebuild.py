"""The files of a prefix, made once: what the pipelines of documents and of pairs share."""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_moe_comp.data.corpora import Corpus
from megatron_moe_comp.data.errors import PreparationError
from megatron_moe_comp.data.outputs import AnyManifest, Outputs

CHANGED_WHILE_READ = "an input file changed while it was read: run again when it is complete"


@dataclass(frozen=True)
class Prepared[M: AnyManifest]:
    """The files of a prefix and what they hold; ``reused`` if they were there already."""

    outputs: Outputs
    manifest: M
    reused: bool


def log_to_stderr(message: str) -> None:
    """Print ``message`` where it does not mix with results."""
    print(message, file=sys.stderr, flush=True)


def make[M: AnyManifest](
    outputs: Outputs,
    kind: type[M],
    corpus: Corpus,
    fingerprint: dict[str, Any],
    build: Callable[..., M],
    log: Callable[[str], None],
) -> Prepared[M]:
    """The files of ``outputs`` for ``fingerprint``, made unless they are there.

    ``build(built, fingerprint=fingerprint)`` writes them and gives their manifest; ``corpus`` is
    what it reads, and ``fingerprint["inputs"]`` that of :func:`fingerprint_sources`.

    Raises:
        PreparationError: an input changed meanwhile.
    """
    if (manifest := outputs.read_manifest(kind)) and manifest.fingerprint == fingerprint:
        return Prepared(outputs, manifest, reused=True)
    with outputs.locked(log):
        # Another process may have made them, or others.
        if old := outputs.read_manifest(kind):
            if old.fingerprint == fingerprint:
                return Prepared(outputs, old, reused=True)
            changed = [key for key in fingerprint if old.fingerprint.get(key) != fingerprint[key]]
            log(f"rebuilding {outputs.prefix}: changed since last time: {', '.join(changed)}")
        with outputs.building() as built:
            manifest = build(built, fingerprint=fingerprint)
            if fingerprint_sources(corpus) != fingerprint["inputs"]:
                raise PreparationError(CHANGED_WHILE_READ)
            manifest = outputs.publish(built, manifest)
    return Prepared(outputs, manifest, reused=False)


def fingerprint_sources(corpus: Corpus) -> str:
    """A digest of each file's name, size and modification time, as make would judge them."""
    digest = hashlib.sha256()
    for source in corpus.sources:
        try:
            status = source.path.stat()
            state = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            state = "unreadable"
        digest.update(f"{source.name}\0{state}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
