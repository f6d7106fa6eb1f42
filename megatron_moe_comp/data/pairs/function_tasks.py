"""Tasks made of Python source, chosen by name: what is asked about a function.

builtins: def stop(self, *args):                    -> len ValueError
    if len(args) > 1:
        raise ValueError(args)

name: def <extra_id_0>(self):                       -> fileno
    # The descriptor of the socket.
    return self._sock.<extra_id_0>()
"""

import ast
import builtins
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from types import BuiltinFunctionType

import sentencepiece

from megatron_moe_comp.data.tokenizer import sentinel

# Without those that the site module adds, such as exit and help.
_BUILTINS = frozenset(
    name
    for name, value in vars(builtins).items()
    if isinstance(value, type | BuiltinFunctionType) and not name.startswith("_")
)


@dataclass(frozen=True)
class Function:
    """A function's name, and its source without its indentation and decorators.

    ``builtins`` are Python's functions, types and exceptions in the order of their uses, each use
    with its line in ``source``, from 0. A name that the source binds anywhere is none of them.
    """

    name: str
    source: str
    builtins: tuple[tuple[int, str], ...] = ()

    @property
    def is_special(self) -> bool:
        """Whether Python gives the name its meaning, as __init__."""
        return self.name.startswith("__") and self.name.endswith("__")


class FunctionTask(ABC):
    """What the input and the target of a function are."""

    @abstractmethod
    def whole_input(self, function: Function) -> str:
        """The input before it is cut; each of its lines is one of the source."""

    @abstractmethod
    def target(self, function: Function, num_lines: int) -> str:
        """The answer of an input of the first ``num_lines``; empty if there is none."""


class Builtins(FunctionTask):
    """To list the builtins that the function uses, each once, in order of first use."""

    def whole_input(self, function: Function) -> str:
        """The source as it is."""
        return f"builtins: {function.source}"

    def target(self, function: Function, num_lines: int) -> str:
        """The builtins of these lines, separated by spaces."""
        return " ".join(dict.fromkeys(name for line, name in function.builtins if line < num_lines))


class Names(FunctionTask):
    """To name the function, whose name is masked wherever it occurs."""

    def whole_input(self, function: Function) -> str:
        """The source with a sentinel for the name."""
        name = rf"\b{re.escape(function.name)}\b"
        return "name: " + re.sub(name, sentinel(0), function.source)

    def target(self, function: Function, num_lines: int) -> str:
        """The name, whatever the lines."""
        return function.name


TASKS: dict[str, FunctionTask] = {"builtins": Builtins(), "names": Names()}


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
            found.append(Function(node.name, source, _find_builtins(node)))
    return found


def _find_builtins(function: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[tuple[int, str], ...]:
    """The uses of builtins as :class:`Function` has them."""
    first = function.lineno
    # The decorators stand before the function's own first line.
    nodes = [node for node in ast.walk(function) if getattr(node, "lineno", first) >= first]
    names = _BUILTINS.difference(*map(_bound_names, nodes))
    uses = [
        (node.lineno - first, node.col_offset, node.id)
        for node in nodes
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names
    ]
    return tuple((line, name) for line, _, name in sorted(uses))


def _bound_names(node: ast.AST) -> Iterable[str]:
    """The names that the node itself gives a meaning, without those of its children."""
    match node:
        case ast.Name(id=name, ctx=ast.Store() | ast.Del()) | ast.arg(arg=name):
            return (name,)
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return (name,)
        case ast.alias(name=name, asname=alias):
            return (alias or name.partition(".")[0],)
        case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)):
            return (name,)
        case ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)):
            return (name,)
    return ()


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
