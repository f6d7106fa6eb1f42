"""What the documents of the repository hold: code blocks with their marks, headings and links."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS = [
    *PAGES,
    ROOT / "CONTRIBUTING.md",
    ROOT / "kernels/README.md",
    ROOT / "kernels/cuda/README.md",
]
FENCE = re.compile(
    r"(?:^<!-- needs: (?P<needs>[^;>]+?)(?:; run by (?P<test>\S+))? -->\n\n?)?"
    r"^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    flags=re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block; `needs` and `test` are of the comment before it."""

    name: str
    language: str
    code: str
    needs: str | None
    test: str | None

    def commands(self):
        """The words of each command, continuation lines joined, comments left out."""
        lines = re.sub(r"\\\n", " ", self.code).splitlines()
        return [words for line in lines if (words := re.sub(r"(^|\s)#\s.*", "", line).split())]


def blocks(path):
    """Every fenced block of a document."""
    text = path.read_text()
    return [
        Block(
            f"{path.relative_to(ROOT)}:{text[: match.start('code')].count(chr(10)) + 1}",
            **match.groupdict(),
        )
        for match in FENCE.finditer(text)
    ]


def without_code(path):
    """The text of a document without fenced blocks and code spans."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "``", text)


def links(path):
    """The target of every link and image."""
    return re.findall(r"\]\(([^)\s]+)\)", without_code(path))


def anchors(path):
    """What can follow # in a link to a document, by the rules of GitHub."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    slugs = set(re.findall(r'<a id="([^"]+)">', text))
    for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE):
        plain = re.sub(r"<[^>]*>|[^\w\s-]", "", heading).strip().lower()
        slugs.add(plain.replace(" ", "-"))
    return slugs
