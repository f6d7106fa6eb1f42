"""A task made of Python source: to name a function whose name is masked.

name: def <extra_id_0>(self):                       -> fileno
    \"\"\"Return the file descriptor of the socket.\"\"\"
    return self._sock.<extra_id_0>()
"""

import ast
import re
import warnings
from dataclasses import dataclass

import sentencepiece

from megatron_moe_comp.data.tokenizer import sentinel

_PREFIX = "name: "


@dataclass(frozen=True)
class Function:
    """A function's name, and its source without its indentation and decorators."""

    name: str
    source: str

    @property
    def is_special(self) -> bool:
        """Whether Python gives the name its meaning, as __init__."""
        return self.name.startswith("__") and self.name.endswith("__")


def find_functions(text: str) -> list[Function]:
    """Every function and method of a Python file, nested ones too.

    Raises:
        SyntaxError: ``text`` is no Python of this version.
    """
    with warnings.catch_warnings(action="ignore"):
        tree = ast.parse(text)
    # Not splitlines, which takes more characters for line ends than Python does.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            own = lines[node.lineno - 1 : node.end_lineno]
            indent = own[0][: node.col_offset]
            source = "\n".join(line.removeprefix(indent) for line in own)
            found.append(Function(node.name, source))
    return found


def mask_name(function: Function) -> str:
    """The function's source as the task's input, with its name masked wherever it occurs."""
    name = rf"\b{re.escape(function.name)}\b"
    return _PREFIX + re.sub(name, sentinel(0), function.source)


def cut_at_line(
    text: str, max_tokens: int, processor: sentencepiece.SentencePieceProcessor
) -> str | None:
    """The first lines of ``text``, of ``max_tokens`` or fewer; None if not even two fit."""
    lines: list[str] = []
    num_tokens = 0
    for line in text.split("\n"):
        num_tokens += len(processor.encode(line + "\n"))
        if num_tokens > max_tokens:
            break
        lines.append(line)
    # Together they may be more, because a piece that spans lines can part others.
    while len(lines) >= 2:
        cut = "\n".join(lines).rstrip()
        if len(processor.encode(cut)) <= max_tokens:
            return cut if "\n" in cut else None
        lines.pop()
    return None
