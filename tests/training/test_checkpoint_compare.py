"""The check against Megatron's own loading, from one layout and model to another."""

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from tests.saved_models import (
    ALTERNATE,
    DENSE,
    ITERATION,
    SWIGLU,
    T5,
    UNTIED,
    build,
    make_config,
    metadata,
    save,
)


def save_model(rank, directory, layout, changes, kind):
    from megatron.core.utils import unwrap_model

    save(directory, *unwrap_model(build(make_config(layout, changes))), kind)


def check(rank, directory, layout, changes, is_strict=True):
    """Returns the check's error, or what it printed in the place of one, and Megatron's."""
    from megatron.core import dist_checkpointing
    from megatron.core.utils import unwrap_model
    from megatron.training.checkpointing import get_checkpoint_name

    from megatron_moe_comp.training import checkpoint_compare
    from megatron_moe_comp.training.checkpoint_start import CheckpointToLoad

    models = build(make_config(layout, changes))
    checkpoint = CheckpointToLoad("--load", directory, ITERATION, False, is_strict)
    printed, ours, theirs = [], None, None
    checkpoint_compare.print_rank_0 = printed.append
    try:
        assert checkpoint_compare.check_checkpoint(lambda: checkpoint, models) is models
    except ValueError as error:
        ours = str(error)
    path = get_checkpoint_name(directory, ITERATION, return_base_dir=True)
    if dist_checkpointing.check_is_distributed_checkpoint(path):
        (model,) = unwrap_model(models)
        wanted = {"model": model.sharded_state_dict(metadata=metadata())}
        try:
            loaded = dist_checkpointing.load(wanted, path)
            model.load_state_dict(loaded["model"])
        except (Exception, CheckpointException) as error:
            theirs = repr(error)
    return ours, printed, theirs


def attempt(pools, directory, saved, loaded, kind="torch_dist", is_strict=True):
    """Returns `check`'s results, the same on all ranks but for Megatron's."""
    pools(saved[0]).run(save_model, str(directory), *saved, kind)
    results = pools(loaded[0]).run(check, str(directory), *loaded, is_strict)
    assert len({ours for ours, _, _ in results}) == 1
    return results


FITS = {
    "the same": (("ep2", {}), ("ep2", {})),
    "EP 2 to 4": (("ep2", SWIGLU), ("ep4", SWIGLU)),
    "EP 4 to PP 2": (("ep4", {}), ("pp2", {})),
    "PP 2 to TP 2": (("pp2", SWIGLU | UNTIED), ("tp2", SWIGLU | UNTIED)),
    "TP 2 to EP 2, alternate layers": (("tp2", ALTERNATE), ("ep2", ALTERNATE)),
    "alternate layers, PP 2": (("ep2", ALTERNATE | SWIGLU), ("pp2", ALTERNATE | SWIGLU)),
    "T5": (("tp2", T5 | ALTERNATE), ("ep2", T5 | ALTERNATE)),
    "a vocabulary padded otherwise": (("ep2", UNTIED), ("ep2", UNTIED | {"vocab_size": 128})),
}


@pytest.mark.parametrize(("saved", "loaded"), FITS.values(), ids=FITS.keys())
def test_what_megatron_loads_in_any_layout_passes(pools, tmp_path, saved, loaded):
    for ours, printed, theirs in attempt(pools, tmp_path, saved, loaded):
        assert (ours, printed, theirs) == (None, [], None)


REFUSED = {
    "dense to experts": (
        ("pp2", DENSE),
        ("ep4", {}),
        ("missing in the checkpoint, 3:", "mlp.router.weight [2, 4, 32]", "--upcycle-from"),
    ),
    "experts to dense": (
        ("tp2", {}),
        ("pp2", DENSE),
        ("missing in the checkpoint, 2:", "not in the model, 3:", "--num-experts"),
    ),
    "hidden size": (
        ("ep2", {}),
        ("tp2", {"hidden_size": 64}),
        (
            "final_layernorm.weight: [32] in the checkpoint, [64] in the model",
            "experts.linear_fc1.weight: [2, 4, 48, 32] in the checkpoint, [2, 4, 48, 64] in the",
            "and 2 more",
            "--use-checkpoint-args",
        ),
    ),
    "SwiGLU": (
        ("ep2", SWIGLU),
        ("ep2", {}),
        ("linear_fc1.weight: [2, 4, 96, 32] in the checkpoint, [2, 4, 48, 32] in the model",),
    ),
    "number of experts": (("ep2", {}), ("ep4", {"num_moe_experts": 8}), ("[2, 8, 48, 32] in",)),
    "layers": (("pp2", {}), ("ep2", {"num_layers": 4}), ("[4, 4, 48, 32] in the model",)),
    "untied embeddings": (
        ("ep2", {}),
        ("pp2", UNTIED),
        ("missing in the checkpoint, 1:", "output_layer.weight [64, 32]"),
    ),
}


@pytest.mark.parametrize(("saved", "loaded", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_one_error_names_what_megatron_cannot_load(pools, tmp_path, saved, loaded, words):
    results = attempt(pools, tmp_path, saved, loaded)
    for word in (f"--load={tmp_path}: the checkpoint of iteration 3 does not fit", *words):
        assert word in results[0][0]
    assert "optimizer" not in results[0][0]
    assert any(theirs for _, _, theirs in results)


SHRUNK = (("pp2", ALTERNATE | UNTIED), ("ep2", ALTERNATE))


def test_what_megatron_would_drop_in_silence_is_refused(pools, tmp_path):
    results = attempt(pools, tmp_path, *SHRUNK)
    assert "not in the model, 1:\n    output_layer.weight [64, 32]\n" in results[0][0]
    assert "missing in the checkpoint" not in results[0][0]
    assert all(theirs is None for _, _, theirs in results)


def test_a_load_that_was_asked_to_drop_it_warns(pools, tmp_path):
    ours, printed, _ = attempt(pools, tmp_path, *SHRUNK, is_strict=False)[0]
    assert ours is None
    (line,) = printed
    assert line.startswith("WARNING: --load=")
    assert "output_layer.weight" in line


OF_FILES = {
    "the same": (("ep2", SWIGLU), ("ep2", SWIGLU), ()),
    "another layout": (("ep2", {}), ("ep4", {}), ("missing files of ranks, 2:", "torch_dist")),
    "hidden size of PP 2": (
        ("pp2", {}),
        ("pp2", {"hidden_size": 64}),
        ("final_layernorm.weight: [32] in the checkpoint, [64] in the model",),
    ),
    "dense": (("pp2", DENSE), ("pp2", {}), ("layers.0.mlp.router.weight [4, 32]", "--upcycle-")),
}


@pytest.mark.parametrize(("saved", "loaded", "words"), OF_FILES.values(), ids=OF_FILES.keys())
def test_files_of_ranks(pools, tmp_path, saved, loaded, words):
    ours, printed, _ = attempt(pools, tmp_path, saved, loaded, kind="torch")[0]
    assert (ours is None) == (not words)
    assert not printed
    for word in words:
        assert word in ours


def nothing_to_load(rank, directory):
    from megatron_moe_comp.training.checkpoint_compare import check_checkpoint
    from megatron_moe_comp.training.checkpoint_start import CheckpointToLoad

    models = build(make_config("ep2", {}))
    absent = CheckpointToLoad("--load", directory, 7, False, True)
    return all(check_checkpoint(lambda x=x: x, models) is models for x in (None, absent))


def test_a_checkpoint_that_is_not_there_is_megatrons_affair(pools, tmp_path):
    assert all(pools("ep2").run(nothing_to_load, str(tmp_path)))
