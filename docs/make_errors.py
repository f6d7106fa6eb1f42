"""Writes docs/errors.md: every message with which this project refuses something, from its source.

    python docs/make_errors.py           # writes docs/errors.md
    python docs/make_errors.py --check   # exits with 1 if that would change it

Words in capitals stand for what a message names at run time.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from error_messages import Sources

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/errors.md"
PACKAGE = "megatron_moe_comp/"
SOURCES = ("*.py", f"{PACKAGE}**/*.py", "benchmarks/*.py", "scripts/**/*")

AREAS = {
    "Compression: methods, bits, wires, and what of Megatron they need": (
        "megatron_moe_comp/options/codec_options.py",
        "megatron_moe_comp/options/config.py",
        "megatron_moe_comp/compression/",
        "megatron_moe_comp/mcore/layer_specs.py",
        "megatron_moe_comp/mcore/dispatchers/compressed.py",
    ),
    "Clustering": ("megatron_moe_comp/options/lsh_options.py",),
    "Starting a run: command line, machine, checkpoints": (
        "",  # whatever has no area of its own
    ),
    "T5 and JSONL files of pairs": (
        "finetune_t5_moe.py",
        "megatron_moe_comp/options/t5_options.py",
        "megatron_moe_comp/mcore/t5_",
        "megatron_moe_comp/data/pairs/reader.py",
    ),
    "Preparing data": ("megatron_moe_comp/data/",),
    "Converting a Hugging Face T5": ("megatron_moe_comp/tasks/t5/convert/",),
    "Planning": ("megatron_moe_comp/plan/",),
    "Reports": ("megatron_moe_comp/report/", "megatron_moe_comp/watch.py"),
    "Installing and submitting": ("setup.py", "scripts/"),
    "Benchmarks": ("benchmarks/",),
    "Operators given wrong tensors: a bug in the caller": ("megatron_moe_comp/ops/",),
}
"""The files of each area, by how their names begin; the longest beginning decides."""

HEADER = """\
# Error messages

Nothing falls back silently: what cannot work is refused, mostly within the first seconds, with a
message that names the option or file, its value, what is required and what to do. Here are all of
them, made from the source by `python docs/make_errors.py`. Words in capitals stand for what a
message names at run time: search for the words between. Files are of `megatron_moe_comp/`, or of
the repository. Messages of Megatron and torch are not ours and not here; [the FAQ](faq.md) has
common ones.
"""

NOT_SHOWN = ("not a manifest", "the model is empty")
"""Raised and caught within one file."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes or checks the page; exits with 1 if it is not what the source gives."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    page = make_page(ROOT)
    if options.check:
        if not options.page.exists() or options.page.read_text() != page:
            sys.exit(f"{options.page}: is not up to date. Run `python docs/make_errors.py`.")
        return
    options.page.write_text(page)


def make_page(root: Path) -> str:
    """Returns the page for the files of a repository."""
    by_area: dict[str, set[tuple[str, str]]] = {area: set() for area in AREAS}
    for file, message in messages(root):
        if message not in NOT_SHOWN:
            by_area[area_of(file)].add((message, file))
    parts = [HEADER]
    for area, found in by_area.items():
        parts.append(f"\n## {area}\n\n| message | where |\n| --- | --- |\n")
        for message, file in sorted(found, key=order):
            parts.append(f"| {code(message)} | `{file.removeprefix(PACKAGE)}` |\n")
    return "".join(parts)


def messages(root: Path) -> Iterator[tuple[str, str]]:
    """Yields (file, message) of the package, the scripts and the benchmarks."""
    paths = sorted(path for pattern in SOURCES for path in root.glob(pattern) if path.is_file())
    chosen = [str(path.relative_to(root)) for path in paths]
    sources = Sources({f: (root / f).read_text() for f in chosen if f.endswith(".py")})
    yield from sources.messages()
    for file in chosen:
        if file.startswith("scripts/"):
            yield from ((file, text) for text in shell_messages((root / file).read_text()))


def shell_messages(script: str) -> Iterator[str]:
    """Yields what a shell script writes to the standard error."""
    for match in re.finditer(r'echo "([^"\n]*)" >&2', script):
        if not re.fullmatch(r"\$\w+", match[1]):
            yield re.sub(r"\$\{?(\w+)\}?", lambda found: found[1].upper(), match[1])
    for match in re.finditer(r"cat >&2 <<'?(\w+)'?\n(.*?)\n\1\n", script, re.DOTALL):
        text = re.sub(r"\$\{(\w+)[^}]*\}", r"\1", match[2])
        yield " ".join(text.split())


def area_of(file: str) -> str:
    """Returns the area of a file."""
    pairs = [(begin, area) for area, begins in AREAS.items() for begin in begins]
    return max((len(begin), area) for begin, area in pairs if file.startswith(begin))[1]


def order(row: tuple[str, str]) -> tuple[bool, str, str]:
    """Returns what messages are sorted by: those that begin with an option come first."""
    message, file = row
    return not message.startswith("--"), message.lower(), file


def code(text: str) -> str:
    """Returns the text as code in a cell of a table."""
    text = text.replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


if __name__ == "__main__":
    main()
