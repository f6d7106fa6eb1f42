"""Sources: the messages of the errors that Python files raise, read from their syntax trees.

A message is an f-string with names of constants, of local strings and of loops over literal tables.
These are put in; what is only known at run time becomes a word in capitals.
"""

import ast
import re
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Names = Mapping[str, ast.expr]
NOT_FOR_USERS = ("AssertionError", "NotImplementedError", "KeyError", "StopIteration")
UNKNOWN = "…"
WORDS = {"chosen_by": "METHOD", "prog": "COMMAND"}


class Sources:
    """The source of several files.

    Args:
        files: source text by name.
    """

    def __init__(self, files: Mapping[str, str]) -> None:
        self._trees = {name: ast.parse(text) for name, text in files.items()}
        self._constants = {file: _assigned(tree.body) for file, tree in self._trees.items()}
        self._fields: dict[str, list[str]] = {}
        for tree in self._trees.values():
            for node in tree.body:
                if isinstance(node, ast.ClassDef):
                    fields = [f.target.id for f in node.body if isinstance(f, ast.AnnAssign)]
                    self._fields[node.name] = fields

    def messages(self) -> Iterator[tuple[str, str]]:
        """Yields (file, message) of every error that is raised and every exit with a message."""
        for file, tree in self._trees.items():
            functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
            constants = ChainMap(self._constants[file], self._imported(file, tree))
            for names, call in self._raised(tree.body, constants):
                for text in self._texts(call, names, functions):
                    # An exit status or another error's text says nothing here.
                    if re.search("[a-z] [a-z]", text):
                        yield file, " ".join(text.split())

    def _imported(self, file: str, tree: ast.Module) -> dict[str, ast.expr]:
        """Returns the constants that a file imports from another of these files."""
        found = {}
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.module:
                module = node.module.replace(".", "/") + ".py"
                beside = f"{file.rpartition('/')[0]}/{module}"
                constants = self._constants.get(module, self._constants.get(beside, {}))
                wanted = ((alias.asname or alias.name, alias.name) for alias in node.names)
                found |= {own: constants[name] for own, name in wanted if name in constants}
        return found

    def _raised(self, body: list[ast.stmt], names: Names) -> Iterator[tuple[Names, ast.expr]]:
        """Yields every raised call or exit, with what its names stand for."""
        for node in body:
            if isinstance(node, ast.Assign):
                names = ChainMap(_strings([node]), names)
            elif isinstance(node, ast.FunctionDef):
                yield from self._raised(node.body, names)
            elif isinstance(node, ast.For):
                for bound in self._bindings(node, names) or [{}]:
                    yield from self._raised(node.body, ChainMap(bound, names))
            elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                yield names, node.exc
            elif isinstance(node, ast.Expr) and _name(node.value) in ("sys.exit", "parser.error"):
                yield names, node.value
            else:
                for part in ("body", "orelse", "finalbody"):
                    yield from self._raised(getattr(node, part, []), names)
                for handler in getattr(node, "handlers", []):
                    yield from self._raised(handler.body, names)

    def _bindings(self, loop: ast.For, names: Names) -> list[dict[str, ast.expr]]:
        """Returns what a loop over a literal table binds, one dict per entry."""
        found = []
        for entry in self._entries(loop.iter, names):
            if isinstance(loop.target, ast.Name):
                found.append({loop.target.id: entry})
            elif isinstance(loop.target, ast.Tuple) and isinstance(entry, ast.Tuple):
                pairs = zip(loop.target.elts, entry.elts, strict=False)
                found.append({t.id: v for t, v in pairs if isinstance(t, ast.Name)})
        return found

    def _entries(self, node: ast.expr, names: Names) -> list[ast.expr]:
        """Returns the entries of a tuple or list, or the keys of a dict; none if not literal."""
        if isinstance(node, ast.Tuple | ast.List):
            return node.elts
        if isinstance(node, ast.Dict):
            return [key for key in node.keys if key is not None]
        if isinstance(node, ast.Name) and node.id in names:
            return self._entries(names[node.id], _without(names, node.id))
        if isinstance(node, ast.BinOp):
            return self._entries(node.left, names) + self._entries(node.right, names)
        if isinstance(node, ast.IfExp):
            return self._entries(node.body, names) + self._entries(node.orelse, names)
        return []

    def _texts(
        self, call: ast.expr, names: Names, functions: Mapping[str, ast.FunctionDef]
    ) -> Iterator[str]:
        """Yields the messages of an error, an exit, or a function that returns either."""
        if isinstance(call, ast.Name) and call.id in names:
            yield from self._texts(names[call.id], names, functions)
        elif isinstance(call, ast.Call) and _name(call) in functions:
            function = functions[_name(call)]
            bound = dict(zip((a.arg for a in function.args.args), call.args, strict=False))
            body = [n for n in ast.walk(function) if isinstance(n, ast.Assign)]
            within = ChainMap(_strings(body), self._put_in(bound, names), names)
            for node in ast.walk(function):
                if isinstance(node, ast.Return) and node.value is not None:
                    yield from self._texts(node.value, within, functions)
        elif isinstance(call, ast.Call) and call.args:
            name = _name(call)
            if name in ("sys.exit", "parser.error") or (
                name.endswith(("Error", "ArgumentTypeError")) and name not in NOT_FOR_USERS
            ):
                yield from self._texts(call.args[0], names, functions)
            elif isinstance(call.func, ast.Attribute) and call.func.attr == "join":
                yield self._text(call, names)
        elif _is_text(call):
            yield self._text(call, names)

    def _put_in(self, arguments: Mapping[str, ast.expr], names: Names) -> dict[str, ast.expr]:
        """Returns arguments as constants, where they are known."""
        return {
            parameter: ast.Constant(self._text(node, names))
            for parameter, node in arguments.items()
            if _is_text(node) or self._attribute(node, names) is not None
        }

    def _text(self, node: ast.expr, names: Names) -> str:
        """Returns what an expression is in a message."""
        match node:
            case ast.Constant():
                return str(node.value)
            case ast.JoinedStr():
                return "".join(self._text(part, names) for part in node.values)
            case ast.FormattedValue():
                return self._text(node.value, names)
            case ast.BinOp(op=ast.Add()) if _is_text(node):
                return self._text(node.left, names) + self._text(node.right, names)
            case ast.IfExp():
                return max(self._text(node.body, names), self._text(node.orelse, names), key=len)
            case ast.Name() if node.id in names and self._is_known(names[node.id], names):
                return self._text(names[node.id], _without(names, node.id))
            case ast.Call():
                return self._text_of_call(node, names)
        found = self._attribute(node, names)
        return _placeholder(node) if found is None else self._text(found, names)

    def _text_of_call(self, node: ast.Call, names: Names) -> str:
        name = _name(node)
        if name == "flag":
            return "--" + self._text(node.args[0], names).replace("_", "-")
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Constant):
            entries = self._entries(node.args[0], names)
            if node.func.attr == "join" and entries:
                kept = [e for e in entries if not isinstance(e, ast.Starred)]
                separator = str(node.func.value.value)
                return separator.join(self._text(entry, names) for entry in kept)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "replace":
            changes = [str(a.value) for a in node.args if isinstance(a, ast.Constant)]
            return self._text(node.func.value, names).replace(*changes)
        return _placeholder(node)

    def _attribute(self, node: ast.expr, names: Names) -> ast.expr | None:
        """Returns the value of a field of an entry of a table, as in `rule.option`, or None."""
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            return None
        entry = names.get(node.value.id)
        fields = self._fields.get(_name(entry)) if isinstance(entry, ast.Call) else None
        if fields is None or node.attr not in fields:
            return None
        values = dict(zip(fields, entry.args, strict=False))
        values |= {k.arg: k.value for k in entry.keywords if k.arg}
        found = values.get(node.attr)
        return found if found is not None and self._is_known(found, names) else None

    def _is_known(self, node: ast.expr, names: Names) -> bool:
        """Whether an expression, or what a name stands for, is text."""
        return _is_text(names.get(node.id, node) if isinstance(node, ast.Name) else node)


def _assigned(body: Sequence[ast.stmt]) -> dict[str, ast.expr]:
    """Returns the values that statements assign to single names."""
    found = {}
    for node in body:
        target: Any = None
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target = node.targets[0]
        elif isinstance(node, ast.AnnAssign):
            target = node.target
        if isinstance(target, ast.Name) and node.value is not None:
            found[target.id] = node.value
        elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = zip(target.elts, node.value.elts, strict=False)
            found |= {t.id: v for t, v in pairs if isinstance(t, ast.Name)}
    return found


def _strings(body: Sequence[ast.stmt]) -> dict[str, ast.expr]:
    """Returns the strings, or calls that may return some, that statements assign to names."""
    return {
        name: value
        for name, value in _assigned(body).items()
        if not isinstance(value, ast.Constant) or isinstance(value.value, str)
        if _is_text(value) or (isinstance(value, ast.Call) and isinstance(value.func, ast.Name))
    }


def _without(names: Names, name: str) -> Names:
    return {key: value for key, value in names.items() if key != name}


def _is_text(node: ast.expr) -> bool:
    """Whether an expression is built of string literals, or is a number."""
    match node:
        case ast.Constant():
            return isinstance(node.value, str | int) and not isinstance(node.value, bool)
        case ast.JoinedStr():
            return True
        case ast.BinOp(op=ast.Add()):
            return _is_text(node.left) or _is_text(node.right)
        case ast.IfExp():
            return _is_text(node.body) or _is_text(node.orelse)
        case ast.Call(func=ast.Name(id="flag")) | ast.Call(func=ast.Attribute(attr="join")):
            return True
    return False


def _name(node: ast.expr) -> str:
    """Returns the name of what is called, "" for anything else."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def _placeholder(node: ast.expr) -> str:
    """Returns a word for a value that is only known at run time."""
    match node:
        case ast.Attribute(attr="__name__"):
            return "TYPE"
        case ast.Name(id=word) | ast.Attribute(attr=word):
            return WORDS.get(word, re.sub(r"^(MOE_A2A_|MOE_LSH_)", "", word.strip("_").upper()))
        case ast.Subscript(value=inner) | ast.Starred(value=inner):
            return _placeholder(inner)
        case ast.Call(func=ast.Name(id="getattr")):
            return "VALUE"
        case ast.Call(func=ast.Name(id="len")) | ast.BinOp():
            return "N"
        case ast.Call(func=ast.Name(id="map"), args=[_, inner]):
            return _placeholder(inner)
        case ast.Call(func=ast.Attribute(attr="join"), args=[inner]):
            return _placeholder(inner)
        case ast.Call(func=ast.Name(id="str" | "repr" | "list" | "sorted"), args=[inner, *_]):
            return _placeholder(inner)
    return UNKNOWN
