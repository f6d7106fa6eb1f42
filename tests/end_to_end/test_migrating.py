"""docs/migrating.md: stock scripts with its diff, or unchanged through megatron_moe_comp.run."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_moe_comp import run as runner
from megatron_moe_comp.training import megatron_lm_script
from megatron_moe_comp.training.megatron_lm_script import compressed
from tests.end_to_end.forks import launch
from tests.end_to_end.runs import ROOT, STOCK, train

ITERATIONS = "--train-iters 3"
BIRDMOE = f"{ITERATIONS} --moe-a2a-compress=birdmoe"
GUIDE = ROOT / "docs/migrating.md"
RUNNER = Path(runner.__file__)


def hunks(text):
    """Yields the lines before and after of each hunk of the guide's diff."""
    (diff,) = re.findall(r"^```diff\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines(keepends=True)
        yield tuple("".join(line[1:] for line in lines if line[0] in (" ", s)) for s in "-+")


def migrated(script, directory):
    """Returns the path of a copy of a script with the guide's diff applied."""
    text = script.read_text()
    for before, after in hunks(GUIDE.read_text()):
        assert len(re.findall(f"^{re.escape(before)}", text, flags=re.MULTILINE)) == 1, before
        text = text.replace(before, after)
    copy = directory / script.name
    copy.write_text(text)
    return copy


def directory(base, name):
    path = base / name
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return train(tmp_path_factory.mktemp("ours"), BIRDMOE, launch=launch).history()


def run_unchanged(base, script, options):
    """Returns the Run of a script that the runner is given."""
    wrapped = lambda _, arguments, *rest: launch(RUNNER, [str(script), *arguments], *rest)  # noqa: E731
    return train(base, options, launch=wrapped)


def test_the_diff_trains_as_our_entry_script_does(ours, tmp_path):
    script = migrated(STOCK, tmp_path)
    run = train(directory(tmp_path, "run"), BIRDMOE, script=script, launch=launch)
    assert run.history() == ours
    assert "Expert all-to-all, birdmoe 6 bit" in run.output
    assert len(ours["lm loss"]) == 3


def test_an_unchanged_script_trains_as_our_entry_script_does(ours, tmp_path):
    run = run_unchanged(tmp_path, STOCK, BIRDMOE)
    assert run.history() == ours
    assert "Expert all-to-all, birdmoe 6 bit" in run.output


@pytest.mark.slow
def test_without_compression_the_diff_is_stock(tmp_path):
    stock = train(directory(tmp_path, "stock"), ITERATIONS, script=STOCK, launch=launch)
    script = migrated(STOCK, tmp_path)
    diff = train(directory(tmp_path, "diff"), ITERATIONS, script=script, launch=launch)
    assert diff.history() == stock.history()


@pytest.mark.slow
def test_megatrons_own_script(ours, tmp_path):
    if "MEGATRON_LM_PATH" not in os.environ:
        pytest.skip("needs a checkout of Megatron-LM core_v0.19.2: MEGATRON_LM_PATH is not set")
    script = Path(os.environ["MEGATRON_LM_PATH"]) / "pretrain_gpt.py"
    assert run_unchanged(directory(tmp_path, "run"), script, BIRDMOE).history() == ours
    # Beside the original, whose modules it imports.
    copy = script.with_name("pretrain_gpt_migrated.py")
    copy.write_text(migrated(script, tmp_path).read_text())
    try:
        diff = train(directory(tmp_path, "diff"), BIRDMOE, script=copy)
        none = train(directory(tmp_path, "none"), ITERATIONS, script=copy)
    finally:
        copy.unlink()
    assert diff.history() == ours
    stock = train(directory(tmp_path, "stock"), ITERATIONS, script=STOCK)
    assert none.history() == stock.history()


@pytest.mark.parametrize(
    ("script", "message"),
    [("missing.py", "missing.py: not a file. Usage: torchrun"), ("", "no script: not a file.")],
)
def test_the_runner_wants_a_script(script, message, monkeypatch):
    monkeypatch.setattr("sys.argv", ["run", *script.split()])
    with pytest.raises(SystemExit, match=re.escape(message)):
        runner.main()


def test_what_cannot_be_compressed_is_refused(monkeypatch):
    parse_and_validate_args, pretrain = compressed(lambda *_: None)
    with pytest.raises(ValueError, match="ignore_unknown_args: a mistyped flag"):
        parse_and_validate_args(ignore_unknown_args=True)
    with pytest.raises(ValueError, match=r"comes after parse_and_validate_args\(\)"):
        pretrain(SimpleNamespace(model=None), None, None, None)
    options = SimpleNamespace(inprocess_restart=False), None
    monkeypatch.setattr(megatron_lm_script, "parse_args", lambda *_, **__: options)
    parse_and_validate_args()
    datasets = forward_step = lambda *_: None
    for container in (SimpleNamespace(model=None), datasets):  # the latter in older scripts
        with pytest.raises(ValueError, match=r"was given NoneType .* Use gpt_config_from_args"):
            pretrain(container, None, None, forward_step)
