"""Prints pip constraints that keep what an image's Python has.

    python scripts/base_packages.py                     # the packages that are kept
    python scripts/base_packages.py constraints.txt     # and, of this file, what is not installed

The kept packages are compiled for each other, and PyPI has none like them. Others may be replaced
where a requirement asks for it. A Python with nothing but pip keeps nothing.
"""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

KEPT = ("apex", "flash-attn", "numpy", "torch", "torchvision", "transformer-engine", "triton")


def normalized(name: str) -> str:
    """Returns the name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    """Prints the constraints."""
    installed = {}
    for found in distributions():
        if found.name:  # a half-removed one has none
            installed.setdefault(normalized(found.name), found)  # the first is the one imported
    for name in KEPT:
        if name in installed:
            found = installed[name]
            print(f"{name}=={found.version}  # {found.locate_file('')}")
    for line in Path(sys.argv[1]).read_text().splitlines() if sys.argv[1:] else ():
        if normalized(line.partition("==")[0]) not in installed:
            print(line)


if __name__ == "__main__":
    main()
