from textwrap import dedent

import pytest

from megatron_moe_comp.data.pairs.function_tasks import Builtins, Function, Names, find_functions

# The builtins that a function ``f`` uses, and a file with it.
USES = {
    "in order": (
        "sum map len min",
        """
        def f(a):
            b = sum(map(len, a)); c = len(b)
            return min(c, sum(a))
        """,
    ),
    "exceptions": (
        "KeyError OSError ValueError",
        """
        def f(a):
            try: a()
            except (KeyError, OSError) as e:
                raise ValueError from e
        """,
    ),
    "annotations and defaults": (
        "int max list str",
        """
        def f(a: int = max(1, 2)) -> list[str]: pass
        """,
    ),
    "formatted strings": (
        "len abs",
        """
        def f(a):
            return f'{len(a)} {a!r:>{abs(a)}} {{id}}'
        """,
    ),
    "not comments, strings, attributes and keywords": (
        "",
        """
        def f(a):
            'len'
            # len
            a.len.max = a(min=1)
            return a.id(b'int')
        """,
    ),
    "not constants, underscores and what site adds": (
        "",
        """
        def f(a=None):
            return True, False, NotImplemented, __import__, exit
        """,
    ),
    "decorators of nested functions alone": (
        "staticmethod len",
        """
        @property
        @d(lambda len: 0,
           max)
        def f(a):
            @staticmethod
            def g(): len(a)
        """,
    ),
    "not parameters": (
        "len",
        """
        def f(id, /, *type, dir, **vars):
            return id, type, dir, vars, len
        """,
    ),
    "not parameters of inner functions": (
        "max",
        """
        def f(a):
            return max(a, key=lambda id: id)
        """,
    ),
    "not what is assigned": (
        "len int",
        """
        def f(a):
            len(a)
            for id, (*iter, b) in a:
                hash: int = id, iter
            return hash, (sum := 1), sum
        """,
    ),
    "not what is imported": (
        "set",
        """
        def f(a):
            from os import open, a as iter
            import list.a, b as dict, c.set as hash
            return open, iter, list, dict, hash, set
        """,
    ),
    "not what is defined inside": (
        "object",
        """
        def f(a):
            def len(): pass
            async def abs(): pass
            class id(object): pass
            return len, abs, id
        """,
    ),
    "not what is caught or matched": (
        "OSError int",
        """
        def f(a):
            try: pass
            except OSError as id: id
            match a:
                case [int(), *iter] as hash: iter, hash
                case {1: _, **vars}: vars
        """,
    ),
    "not what is deleted": (
        "",
        """
        def f(a):
            del len
            len
        """,
    ),
    "bindings and uses outside change nothing": (
        "id",
        """
        len(hash)
        class A(int):
            id = hash
            async def f(self):
                return id
        """,
    ),
}


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize(("expected", "text"), USES.values(), ids=USES)
def test_builtins_are_those_that_the_function_uses(expected, text, line_end):
    functions = find_functions(dedent(text).replace("\n", line_end))
    (function,) = (function for function in functions if function.name == "f")
    assert Builtins().whole_input(function) == f"builtins: {function.source}"
    assert Builtins().target(function, 99) == expected


def test_function_named_as_a_builtin_does_not_use_it():
    (function,) = find_functions("class A:\n    def open(self): return open(self.path), str")
    assert Builtins().target(function, 1) == "str"


def test_builtins_of_lines_cut_off_do_not_count():
    text = dedent("""
        class A:
            @classmethod
            def f(a, b=len,
                  c=max):
                sum = str(
                    len(a)
                )
                def g(d):
                    return abs(d), sum
    """)
    outer, inner = find_functions(text)
    targets = [Builtins().target(outer, num_lines) for num_lines in range(1, 8)]
    assert targets == ["len", "len max", *["len max str"] * 4, "len max str abs"]
    assert inner.source == "def g(d):\n    return abs(d), sum"
    # The inner function alone does not say that sum is another one.
    assert [Builtins().target(inner, num_lines) for num_lines in (1, 2)] == ["", "abs sum"]


def test_name_is_masked_wherever_it_stands_alone():
    function = Function(
        "get", "def get(self):\n    # get() gets get_all, _get\n    self.get('get')"
    )
    assert Names().whole_input(function) == (
        "name: def <extra_id_0>(self):\n    # <extra_id_0>() gets get_all, _get\n"
        "    self.<extra_id_0>('<extra_id_0>')"
    )
    assert Names().target(function, 1) == "get"
    assert Function("__init__", "").is_special
    assert not Function("__private", "").is_special
