"""Who may import whom: a room of the package imports rooms to its left only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "megatron_moe_comp"
ORDER = ["ops", "compression", "options", "stats", "comm", "mcore", "plan", "training", "tasks"]
FREE_STANDING = ["data", "cpu_host", "report"]
"""Import nothing of ours but themselves."""

FILES = sorted((ROOT / PACKAGE).rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from megatron_moe_comp import ops` names a room, too.
            names = [alias.name for alias in node.names] if node.module == PACKAGE else [""]
            yield from (f"{node.module}.{name}".rstrip(".") for name in names)


def allowed_rooms(path):
    room = path.relative_to(ROOT / PACKAGE).parts[0]
    if room in FREE_STANDING:
        return {room}
    if room in ORDER and path.name != "__main__.py":
        return {*ORDER[: ORDER.index(room) + 1], *FREE_STANDING}
    return {*ORDER, *FREE_STANDING}  # a command


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_rooms_to_its_left(path):
    room = path.relative_to(ROOT / PACKAGE).parts[0]
    for name in imports(path):
        parent, _, rest = name.partition(PACKAGE + ".")
        if rest and not parent:
            assert rest.split(".")[0] in allowed_rooms(path), name
        if name.startswith("megatron."):
            assert room in (*ORDER[ORDER.index("mcore") :], "data", "cpu_host"), name
        if name.startswith("torch.distributed"):
            assert room in ("comm", "cpu_host"), name


def test_no_folder_and_no_file_is_too_large():
    registries = {"codecs"}
    for folder in {path.parent for path in FILES}:
        assert folder.name in registries or len(list(folder.glob("*.py"))) <= 14, folder
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 300, path
