"""docs/errors.md has every message that is raised, as it is raised."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
import error_messages
import make_errors

from megatron_moe_comp.options.config import CompressionConfig
from megatron_moe_comp.plan.shape import Layout

SAMPLE = """
LIMIT, OPTION = 64, "--limit"
KINDS = {"a": 1, "b": 2}

class Rule:
    option: str
    why: str

RULES = (Rule("first_one", "is first"), Rule("second", why="is second"))

def check(args):
    for name in ("x_size", "y_size"):
        if args.wrong:
            raise ValueError(f"{flag(name)}={getattr(args, name)}: too large. Use up to {LIMIT}.")
    for rule in RULES:
        given = flag(rule.option) + ("" if args.value is True else f"={args.value}")
        raise ValueError(f"{given}: {rule.why}. Drop it.")
    text = f"{OPTION}: not one of {', '.join(KINDS)}. "
    if args.long:
        raise OwnError(text + "Choose one.")
    if args.stop:
        sys.exit(0)
    raise made(args.path, "rename it")

def made(path, remedy):
    return ValueError(f"{path}: there is one already: {remedy}")
"""


def test_the_page_is_up_to_date():
    make_errors.main(["--check"])


def test_check_says_what_to_run(tmp_path):
    with pytest.raises(SystemExit, match=r"python docs/make_errors\.py"):
        make_errors.main(["--check", "--page", str(tmp_path / "errors.md")])


def test_tables_constants_and_helpers_are_put_in():
    found = [text for _, text in error_messages.Sources({"sample.py": SAMPLE}).messages()]
    assert found == [
        "--x-size=VALUE: too large. Use up to 64.",
        "--y-size=VALUE: too large. Use up to 64.",
        "--first-one=VALUE: is first. Drop it.",
        "--second=VALUE: is second. Drop it.",
        "--limit: not one of a, b. Choose one.",
        "PATH: there is one already: rename it",
    ]


def test_what_shell_scripts_say():
    script = (
        'echo "$output" >&2\necho "$config: not there." >&2\ncat >&2 <<END\nno ${CXX:-c++}\nEND\n'
    )
    assert list(make_errors.shell_messages(script)) == ["CONFIG: not there.", "no CXX"]


@pytest.mark.parametrize(
    "refused",
    [
        lambda: CompressionConfig(moe_a2a_compress="birdmoe", moe_a2a_bits=9),
        lambda: CompressionConfig(moe_a2a_compress="bf16", moe_a2a_bits=6),
        lambda: CompressionConfig(moe_a2a_chunks=65),
        lambda: CompressionConfig(moe_a2a_compress="lsh", moe_a2a_dedup=True),
        lambda: CompressionConfig(moe_a2a_compress="rq", moe_lsh_residual="fitted"),
        lambda: CompressionConfig(moe_lsh_target_rate=2.0),
        lambda: Layout(8, 3, 8),
    ],
)
def test_a_message_that_is_raised_is_on_the_page(refused):
    with pytest.raises(ValueError, match=": ") as raised:
        refused()
    page = make_errors.PAGE.read_text()
    templates = re.findall(r"^\| `(.*)` \| `", page, flags=re.MULTILINE)
    patterns = [re.sub(r"\b[A-Z][A-Z_]+\b|…", ".+", re.escape(t)) for t in templates]
    assert any(re.fullmatch(pattern, str(raised.value)) for pattern in patterns), raised.value
