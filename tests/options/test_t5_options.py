import sys
from argparse import ArgumentParser
from dataclasses import fields
from typing import get_args

import pytest
from megatron.training.arguments import parse_args

from megatron_moe_comp.options.t5_options import Activation, BadLines, LongLines, T5Options, Task
from megatron_moe_comp.training.arguments import add_t5_args, t5_options_from_args


def options(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["train", *flags.split()])
    return t5_options_from_args(parse_args(add_t5_args))


def test_every_field_has_one_flag_with_help():
    parser = add_t5_args(ArgumentParser(prog="train"))
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    assert set(actions) == {field.name for field in fields(T5Options)}
    for name, action in actions.items():
        assert action.option_strings == ["--" + name.replace("_", "-")]
        assert len(action.help) > 30
    assert "{seq2seq,span-corruption}" in parser.format_help()


def test_defaults(monkeypatch):
    assert options(monkeypatch, "") == T5Options()


def test_flags_reach_the_options(monkeypatch):
    flags = (
        "--task=seq2seq --t5-activation=geglu --t5-relative-positions --bad-lines=skip "
        "--long-lines=truncate --decode-samples=7 --predictions-jsonl=x.jsonl"
    )
    assert options(monkeypatch, flags) == T5Options(
        task="seq2seq",
        t5_activation="geglu",
        t5_relative_positions=True,
        bad_lines="skip",
        long_lines="truncate",
        decode_samples=7,
        predictions_jsonl="x.jsonl",
    )


CHOICES = {"task": Task, "bad_lines": BadLines, "long_lines": LongLines}


@pytest.mark.parametrize("name", [*CHOICES, "t5_activation"])
def test_choices(name):
    choices = get_args(CHOICES.get(name, Activation))
    for choice in choices:
        assert getattr(T5Options(**{name: choice}), name) == choice
    with pytest.raises(ValueError, match="Choose one of these") as caught:
        T5Options(**{name: "other"})
    assert str(caught.value).startswith(
        f"--{name.replace('_', '-')}=other: not one of {', '.join(choices)}."
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--decode-samples=-1", "--decode-samples=-1: must be 0 or more; 0 evaluates the loss"),
        (
            "--task=span-corruption --predictions-jsonl=x",
            r"--predictions-jsonl=x: --task=span-corruption decodes no answers. Drop",
        ),
        ("--task=translation", "--task=translation: not one of seq2seq, span-corruption. Choose"),
        ("--t5-activation=swiglu", "--t5-activation=swiglu: not one of relu, geglu. Choose"),
    ],
)
def test_a_bad_value_is_refused_with_option_requirement_and_remedy(monkeypatch, flags, message):
    with pytest.raises(ValueError, match=message):
        options(monkeypatch, flags)


def test_no_decoding():
    assert T5Options(decode_samples=0).decode_samples == 0
