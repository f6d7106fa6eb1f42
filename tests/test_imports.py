"""The import table of CONTRIBUTING.md, enforced."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "megatron_moe_comp"
MODULES = sorted((ROOT / PACKAGE).rglob("*.py")) + sorted(ROOT.glob("*_moe.py"))

LEVELS = {
    "answer_scores": 0,
    "config": 0,
    "codec_options": 0,
    "lsh_options": 0,
    "t5_options": 0,
    "model_rules": 0,
    "comm_stats": 0,
    "phase_times": 0,
    "ops": 0,
    "compression.payload": 0,
    "compression.random_stream": 0,
    "compression.bit_allocation": 0,
    "compression.lsh_state": 0,
    "compression.hash_families": 1,
    "compression.lsh_clustering": 1,
    "compression.codec": 1,
    "compression.codecs": 1,
    "compression.packet": 1,
    "comm": 2,
    "mcore.counted_token_dispatcher": 3,
    "mcore.token_dispatcher": 3,
    "mcore.dedup_token_dispatcher": 3,
    "mcore.lsh_token_dispatcher": 3,
    "mcore.per_row_lsh_token_dispatcher": 3,
    "mcore.biased_attention": 3,
    "mcore.moe_layer": 4,
    "mcore.checkpoint_check": 5,
    "mcore.layer_specs": 5,
    "mcore.lsh_adaptation": 5,
    "mcore.arguments": 5,
    "mcore.checkpoint_arguments": 5,
    "mcore.log_outputs": 5,
    "mcore.stats_logging": 5,
    "mcore.stats_text": 5,
    "mcore.upcycling": 5,
    "mcore.t5_specs": 5,
    "mcore.t5_model": 5,
    "mcore.t5_batches": 5,
    "mcore.greedy_decoding": 5,
    "mcore.answers": 5,
    "mcore.entry": 6,
    "mcore.own_script": 7,
    "run": 7,
    "mcore.auto_method": 5,
    "mcore.dry_run": 5,
    "convert": 6,
    "plan.shape": 0,
    "plan.operations": 0,
    "plan.cost_model": 0,
    "plan.break_even": 0,
    "plan.presets": 0,
    "plan.methods": 1,
    "plan.report": 1,
    "plan.measure": 2,
    "plan.__main__": 6,
}
FREE_STANDING = ("data", "report", "watch", "mcore.cpu_", "mcore.wheel_")
"""Not used by the training itself; they import nothing of ours but each other."""

READ_GLOBAL_ARGUMENTS = ("mcore.arguments", "mcore.checkpoint_arguments")
ARGUMENTS_IMPORT_ONLY = (
    "config",
    "codec_options",
    "lsh_options",
    "t5_options",
    "compression.random_stream",
)


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inner(name):
    return name.removeprefix(PACKAGE).removeprefix(".")


def level(name):
    """Level of a module of ours; None for other packages."""
    if name != PACKAGE and not name.startswith(PACKAGE + "."):
        return None
    parts = inner(name).split(".")
    for depth in range(len(parts), 0, -1):
        found = LEVELS.get(".".join(parts[:depth]))
        if found is not None:
            return found
    return None


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path):
    name = name_of(path)
    short = inner(name)
    if not name.startswith(PACKAGE) or short == "":
        return
    if short.startswith(FREE_STANDING):
        group = short.split(".")[0]
        assert all(inner(i).startswith(group) for i in imports(path) if i.startswith(PACKAGE + "."))
        return
    own = level(name)
    if own is None:
        assert path.name == "__init__.py", f"{name} is in no level of the table"
        assert not list(imports(path)), f"{name}: a package's __init__ imports nothing"
        return
    for imported in imports(path):
        other = level(imported)
        assert other is None or other <= own, f"{name} (level {own}) imports {imported} ({other})"
        if short in READ_GLOBAL_ARGUMENTS and imported.startswith(PACKAGE + "."):
            assert inner(imported).startswith(ARGUMENTS_IMPORT_ONLY), imported


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_megatron_and_distributed_stay_in_their_place(path):
    short = inner(name_of(path))
    entry = not name_of(path).startswith(PACKAGE)
    for imported in imports(path):
        of_megatron = imported.split(".")[0] == "megatron"
        if of_megatron and not short.startswith(("mcore", "convert.")) and not entry:
            assert short.startswith("data"), f"{short} imports {imported}"
            assert imported.startswith("megatron.core."), f"{short} imports {imported}"
        if imported.startswith("torch.distributed"):
            assert short.startswith(("comm.", "mcore.cpu_", "mcore.wheel_")), short


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_bans(path):
    short, text = inner(name_of(path)), path.read_text()
    entry = not name_of(path).startswith(PACKAGE)
    if not entry and short not in READ_GLOBAL_ARGUMENTS:
        of_typing = re.search(r"^from typing import .*\bget_args\b", text, re.MULTILINE)
        assert of_typing or "get_args(" not in text.replace("typing.get_args(", ""), (
            f"{short} reads Megatron's global arguments"
        )
    if not entry and not short.startswith(("mcore.cpu_", "mcore.wheel_")):
        assert ".cuda()" not in text
        assert "torch.cuda.current_device" not in text
