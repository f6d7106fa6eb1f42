"""Writes docs/flags.md from the parsers of the flags: python docs/make_flags.py [--check]."""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_moe_comp.cpu_host.settings import REFUSALS, SETTINGS
from megatron_moe_comp.training import arguments, dry_run

PAGE = Path(__file__).parent / "flags.md"
GENERATOR = "docs/make_flags.py"
INTRODUCTION = f"""# Flags

<!-- Made by {GENERATOR} from the fields of the options' dataclasses and their docstrings. -->

`pretrain_gpt_moe.py`, `finetune_t5_moe.py` and [scripts like Megatron-LM's](migrating.md) take
every flag of Megatron and these. What the methods do and cost: [methods](methods.md).

Required beside them: `--num-experts N --moe-token-dispatcher-type alltoall` and an
`--expert-model-parallel-size` above 1 (rows that stay on their rank are not compressed). A hidden
size must be a multiple of 8. Not supported with compression, and refused at start: other
dispatchers, `--moe-shared-expert-overlap`, CUDA graphs, 1F1B all-to-all overlap, multi-token
prediction. Not with `lsh`, and refused: `--moe-a2a-dedup`, padding experts to capacity or for
quantization, `--moe-apply-probs-on-input`. Options that do not go together are refused with the
remedy.
"""
SECTIONS = {
    "compressed expert all-to-all: codecs": "Method, codec and bits",
    "compressed expert all-to-all": "All-to-alls",
    "clustering by locality-sensitive hashing": "Clustering (`--moe-a2a-compress=lsh`)",
    "starting points": "Starting points and trials",
    "T5 and sequence-to-sequence data": "T5 (`finetune_t5_moe.py`)",
}
TYPES = {int: "a number", float: "a number"}


def main() -> None:
    """Writes the page, or with --check fails where it is not current."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if it would")
    text = page()
    if not parser.parse_args().check:
        PAGE.write_text(text)
    elif PAGE.read_text() != text:
        sys.exit(f"{PAGE.name} is not current: run python {GENERATOR}")


def page() -> str:
    """Returns the whole page."""
    return "\n".join([INTRODUCTION, *_flags(), *_without_gpu()]).rstrip() + "\n"


def _flags() -> Iterator[str]:
    """Yields a section for each group of flags."""
    for title, actions in flag_groups().items():
        yield f"## {SECTIONS[title]}\n"
        for action in actions:
            (flag,) = action.option_strings
            yield f'### <a id="{flag[2:]}"></a>`{flag}`\n'
            yield f"{_values(action)}\n"
            yield re.sub(r"--[a-z0-9-]+\*?", r"`\g<0>`", action.help or "") + "\n"


def flag_groups() -> dict[str, list[argparse.Action]]:
    """Returns the title of each group and its flags, in the order of SECTIONS."""
    parser = argparse.ArgumentParser(add_help=False)
    arguments.with_our_flags(arguments.add_t5_args)(parser)
    groups = {group.title: list(group._group_actions) for group in parser._action_groups}
    trial = argparse.ArgumentParser(add_help=False)
    groups["starting points"] += dry_run.add_dry_run_args(trial)._actions
    return {title: groups[title] for title in SECTIONS}


def _values(action: argparse.Action) -> str:
    """Returns a line with the values of a flag and its default."""
    if action.nargs == 0:
        return "*no value; default: off*"
    metavar = str(action.metavar or "")
    if metavar.startswith("{"):
        values = ", ".join(f"`{name}`" for name in metavar.strip("{}").split(","))
    elif action.nargs == "*":
        values = "any of " + ", ".join(f"`{name}`" for name in action.default)
        return f"*values: {values}; default: all*"
    else:
        values = TYPES.get(action.type, "a path")
    default = "see below" if "default:" in (action.help or "") else "none"
    if action.default is not None:
        default = f"`{action.default}`"
    return f"*values: {values}; default: {default}*"


def _without_gpu() -> Iterator[str]:
    """Yields the section on Megatron's own flags in CPU host mode."""
    yield "## Megatron's flags without a GPU\n"
    yield (
        "Where no CUDA device is visible the scripts switch to CPU host mode and say so; "
        "`CUDA_VISIBLE_DEVICES= ` forces it. These are set, and another value is refused:\n"
    )
    yield "| set | since other values need |\n|---|---|"
    yield from (f"| `{setting.flag}` | {setting.why} |" for setting in SETTINGS)
    yield "\nThese are refused:\n\n| refused | needs |\n|---|---|"
    for refusal in REFUSALS:
        flag = "--" + refusal.dest.replace("_", "-")
        if isinstance(refusal.values, range):
            flag += f" {refusal.values[0]} and more"
        elif refusal.values != (True,):
            flag += " " + ", ".join(refusal.values)
        yield f"| `{flag}` | {refusal.why} |"


if __name__ == "__main__":
    main()
