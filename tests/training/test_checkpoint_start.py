"""What Megatron will load, and what our state in a checkpoint's arguments does."""

from argparse import Namespace

import pytest

from megatron_moe_comp.training import checkpoint_start


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12")
    return str(tmp_path)


def test_checkpoint_to_load(monkeypatch, checkpoint, tmp_path):
    def found(**changes):
        args = Namespace(
            **{
                "load": None,
                "pretrained_checkpoint": None,
                "ckpt_step": None,
                "non_persistent_ckpt_type": None,
                "moe_use_upcycling": False,
                "dist_ckpt_strictness": "assume_ok_unexpected",
            }
            | changes
        )
        monkeypatch.setattr(checkpoint_start, "get_args", lambda: args)
        return checkpoint_start.checkpoint_to_load()

    empty = str(tmp_path / "empty")
    expected = checkpoint_start.CheckpointToLoad("--load", checkpoint, 12, False, True)
    assert found() is None
    assert found(load=empty) is None
    assert found(load=checkpoint) == expected
    assert found(load=checkpoint, ckpt_step=5) == expected._replace(iteration=5)
    assert found(load=checkpoint, dist_ckpt_strictness="log_all") == expected._replace(
        is_strict=False
    )
    assert found(load=checkpoint, non_persistent_ckpt_type="global") is None
    assert found(load=checkpoint, pretrained_checkpoint=empty) == expected
    pretrained = expected._replace(option="--pretrained-checkpoint")
    assert found(load=empty, pretrained_checkpoint=checkpoint) == pretrained
    assert found(pretrained_checkpoint=checkpoint) == pretrained
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    assert found(load=checkpoint) == expected._replace(iteration=0, is_release=True)


@pytest.mark.parametrize(("finetune", "expected"), [(False, {"method": "none"}), (True, None)])
def test_the_choice_of_auto_is_that_of_the_run_that_goes_on(monkeypatch, finetune, expected):
    saved = Namespace()
    monkeypatch.setattr(checkpoint_start, "get_args", lambda: saved)
    checkpoint_start.keep_auto_decision({"method": "none"})
    monkeypatch.setattr(checkpoint_start, "get_args", lambda: Namespace(finetune=finetune))
    monkeypatch.setattr(checkpoint_start, "_args_of_checkpoint", lambda option: saved)
    assert checkpoint_start.auto_decision_of_checkpoint() == expected
    monkeypatch.setattr(checkpoint_start, "_args_of_checkpoint", lambda option: None)
    assert checkpoint_start.auto_decision_of_checkpoint() is None
