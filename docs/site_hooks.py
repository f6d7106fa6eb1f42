"""MkDocs hooks: pages from outside docs/, and links that hold on the site and in the repository."""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "kernels/README.md": "kernels/index.md",
    "kernels/cuda/README.md": "kernels/cuda.md",
} | {
    f"benchmarks/results/{path.name}": f"results/{path.name}"
    for path in sorted(ROOT.glob("benchmarks/results/*.md"))
}
"""Path in the repository -> path among the sources of the site."""

LINK = re.compile(r"(!?)\[([^]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Returns the files of docs/ and the pages from outside."""
    for path, name in OUTSIDE.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:  # noqa: ANN401
    """Returns a page's text with its links as the site has the files.

    A link to a file that the site has not becomes the name of it.
    """
    name = page.file.src_uri
    path = {site: path for path, site in OUTSIDE.items()}.get(name, f"docs/{name}")

    def on_site(link: re.Match[str]) -> str:
        image, text, target, anchor = link.groups()
        if ":" in target:
            return link[0]
        wanted = os.path.normpath(os.path.join(os.path.dirname(path), target))
        found = OUTSIDE.get(wanted, wanted.removeprefix("docs/"))
        if found == wanted and (ROOT / wanted).exists():
            return text
        there = os.path.relpath(found, os.path.dirname(name) or ".")
        return f"{image}[{text}]({there}{anchor or ''})"

    return LINK.sub(on_site, markdown)
