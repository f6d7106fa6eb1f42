import math
from argparse import Namespace
from dataclasses import fields, replace
from typing import get_args

import pytest

from megatron_moe_comp.compression.codecs import CODECS
from megatron_moe_comp.compression.wires import WIRES
from megatron_moe_comp.options.codec_options import (
    BITS_RANGE,
    CodecName,
    Coding,
    Method,
)
from megatron_moe_comp.options.config import CompressionConfig
from megatron_moe_comp.options.lsh_options import LshOptions

MODEL = {
    "moe_token_dispatcher_type": "alltoall",
    "hidden_size": 256,
    "moe_latent_size": None,
}


def model(**changes):
    return Namespace(**(MODEL | changes))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"moe_a2a_compress": "zip"}, ("--moe-a2a-compress=zip", "none, auto, birdmoe, lsh")),
        ({"moe_a2a_bits": 1}, ("--moe-a2a-bits=1", "2 to 8")),
        ({"moe_a2a_bits": 9}, ("--moe-a2a-bits=9", "2 to 8")),
        ({"moe_a2a_compress": "pwlq", "moe_a2a_bits": 2}, ("--moe-a2a-bits=2", "pwlq", "3 to 8")),
        ({"moe_a2a_compress": "fp8", "moe_a2a_bits": 8}, ("--moe-a2a-bits=8", "fixed width")),
        ({"moe_a2a_compress": "bf16", "moe_a2a_bit_policy": "optimal"}, ("bit-policy", "fixed")),
        ({"moe_a2a_bit_policy": "fair"}, ("--moe-a2a-bit-policy=fair", "proportional")),
        ({"moe_a2a_min_bits": 1}, ("--moe-a2a-min-bits=1", "2 to 8")),
        ({"moe_a2a_max_bits": 9}, ("--moe-a2a-max-bits=9", "2 to 8")),
        ({"moe_a2a_min_bits": 7}, ("--moe-a2a-bits=6", "--moe-a2a-min-bits=7")),
        ({"moe_a2a_max_bits": 5}, ("--moe-a2a-bits=6", "--moe-a2a-max-bits=5")),
        ({"moe_a2a_compress": "rq", "moe_a2a_max_bits": 7}, ("--moe-a2a-max-bits=7", "uniform")),
        ({"moe_a2a_compress": "auto", "moe_a2a_bits": 9}, ("--moe-a2a-bits=9", "2 to 8")),
        ({"moe_a2a_compress": "auto", "moe_a2a_codec": "rq"}, ("--moe-a2a-codec=rq", "lsh")),
        ({"moe_a2a_compress": "auto", "moe_a2a_backward_bits": 4}, ("backward-bits=4", "birdmoe")),
        ({"moe_a2a_compress": "auto", "moe_lsh_refine": 2}, ("--moe-lsh-refine=2", "=auto")),
        ({"moe_a2a_compress": "auto", "moe_a2a_min_bits": 5}, ("--moe-a2a-min-bits=5", "uniform")),
        ({"moe_a2a_scope": "node"}, ("--moe-a2a-scope=node", "inter-node")),
        ({"moe_a2a_scope": "inter-node"}, ("--moe-a2a-scope=inter-node", "ranks-per-node")),
        ({"moe_a2a_ranks_per_node": 0}, ("--moe-a2a-ranks-per-node=0", "from 1")),
        ({"moe_a2a_chunks": 0}, ("--moe-a2a-chunks=0", "1 to 64")),
        ({"moe_a2a_chunks": 65}, ("--moe-a2a-chunks=65", "1 to 64")),
        ({"moe_a2a_chunks": 2, "moe_a2a_scale_per": "chunk"}, ("chunks=2", "scale-per=row")),
        ({"moe_a2a_chunks": 2, "moe_a2a_compress": "lq"}, ("chunks=2", "another method")),
        ({"moe_a2a_compress": "int8", "moe_a2a_scale_per": "chunk"}, ("int8", "birdmoe or rq")),
        ({"moe_a2a_scale_per": "tensor"}, ("--moe-a2a-scale-per=tensor", "row, chunk")),
        ({"moe_a2a_wires": ("dispatch",)}, ("--moe-a2a-wires=dispatch", "dispatch_fwd")),
        ({"moe_a2a_seed": -1}, ("--moe-a2a-seed=-1", "from 0 to 4294967295")),
        ({"moe_a2a_seed": 2**32}, ("--moe-a2a-seed=4294967296", "from 0 to 4294967295")),
    ],
)
def test_a_bad_value_is_refused_with_option_requirement_and_remedy(changes, parts):
    with pytest.raises(ValueError, match=r"Use |use |Choose |Set ") as caught:
        CompressionConfig(**{"moe_a2a_compress": "birdmoe"} | changes)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    ("method", "bits", "policy", "limits"),
    [
        ("none", None, None, (0, 0)),
        ("auto", None, None, (0, 0)),
        ("birdmoe", 6, "optimal", (3, 8)),
        ("rq", 6, "uniform", (6, 6)),
        ("pwlq", 6, "uniform", (6, 6)),
        ("gaussian", 4, "uniform", (4, 4)),
        ("mxfp8", None, "uniform", (0, 0)),
    ],
)
def test_what_is_not_given_follows_the_method(method, bits, policy, limits):
    config = CompressionConfig(moe_a2a_compress=method)
    assert config.moe_a2a_bits == bits
    assert config.moe_a2a_bit_policy == policy
    assert config.forward[1:] == config.backward[1:] == (bits or 0, *limits)
    assert replace(config, moe_a2a_seed=1) == CompressionConfig(
        moe_a2a_compress=method, moe_a2a_seed=1
    )


@pytest.mark.parametrize(
    ("method", "bits", "fewest"),
    [("birdmoe", 2, 2), ("birdmoe", 5, 2), ("birdmoe", 8, 4), ("pwlq", 4, 3), ("pwlq", 8, 4)],
)
def test_a_policy_gives_at_least_half_the_bits(method, bits, fewest):
    config = CompressionConfig(
        moe_a2a_compress=method, moe_a2a_bits=bits, moe_a2a_bit_policy="optimal"
    )
    assert config.forward.min_bits == fewest


def test_none_ignores_the_options_of_other_methods():
    CompressionConfig(moe_a2a_bits=3, moe_a2a_bit_policy="optimal", moe_a2a_chunks=4)


def test_what_auto_may_become():
    auto = CompressionConfig(moe_a2a_compress="auto", moe_a2a_chunks=4, moe_a2a_dedup=True)
    assert auto.enabled  # so that what birdmoe cannot work with is refused
    assert auto.resolved(None) == replace(auto, moe_a2a_compress="none")
    found = auto.resolved(7)
    assert (found.moe_a2a_compress, found.forward.bits, found.forward.codec) == ("birdmoe", 7, "rq")
    assert (found.moe_a2a_bit_policy, found.moe_a2a_chunks, found.moe_a2a_dedup) == (
        "uniform",
        4,
        True,
    )
    load_aware = replace(auto, moe_a2a_bit_policy="optimal")
    assert load_aware.resolved(8).moe_a2a_min_bits == 6
    assert load_aware.resolved(4).moe_a2a_min_bits == 4
    assert replace(load_aware, moe_a2a_min_bits=3).resolved(8).moe_a2a_min_bits == 3


def test_every_method_is_a_codec_or_has_one():
    assert set(get_args(CodecName)) == set(CODECS)
    assert set(get_args(Method)) == {"none", "auto", "birdmoe", "lsh", *CODECS}
    for name, codec in CODECS.items():
        assert BITS_RANGE.get(name) == codec.num_bits_range, name
    assert BITS_RANGE.keys() <= CODECS.keys()


@pytest.mark.parametrize(
    ("options", "codec"),
    [
        ({"moe_a2a_compress": "none"}, "identity"),
        ({"moe_a2a_compress": "birdmoe"}, "rq"),
        ({"moe_a2a_compress": "fp8"}, "fp8"),
        ({"moe_a2a_compress": "identity"}, "identity"),
        ({"moe_a2a_compress": "lsh"}, "identity"),
        ({"moe_a2a_compress": "lsh", "moe_a2a_codec": "topk"}, "topk"),
    ],
)
def test_what_encodes(options, codec):
    config = CompressionConfig(**options)
    assert config.forward.codec == config.backward.codec == codec


def directions(**options):
    config = CompressionConfig(**options)
    assert replace(config) == config
    assert [config.coding(wire) for wire in WIRES] == [config.forward] * 2 + [config.backward] * 2
    return config.forward, config.backward


@pytest.mark.parametrize(
    ("options", "forward", "backward"),
    [
        ({"compress": "birdmoe", "codec": "gaussian"}, ("gaussian", 4, 2, 4), None),
        (
            {"compress": "birdmoe", "bits": 3, "codec": "gaussian", "backward_codec": "dithered"},
            ("gaussian", 3, 2, 4),
            ("dithered", 3, 2, 8),
        ),
        (
            {"compress": "birdmoe", "bits": 3, "backward_bits": 5, "backward_codec": "lq"},
            ("gaussian", 3, 2, 4),
            ("lq", 5, 2, 8),
        ),
        (
            {"compress": "dithered", "backward_bits": 8},
            ("dithered", 6, 6, 6),
            ("dithered",) + (8,) * 3,
        ),
        (
            {"compress": "lsh", "codec": "gaussian", "bits": 2, "backward_codec": "rq"},
            ("gaussian", 2, 2, 2),
            ("rq", 2, 2, 2),
        ),
        (
            {"compress": "birdmoe", "backward_bits": 4, "min_bits": 3, "max_bits": 7},
            ("rq", 6, 3, 7),
            ("dithered", 4, 3, 7),
        ),
    ],
)
def test_directions_have_codecs_and_bits(options, forward, backward):
    options = {f"moe_a2a_{name}": value for name, value in options.items()}
    assert directions(**options) == (Coding(*forward), Coding(*(backward or forward)))


def test_birdmoe_encodes_as_its_table_says_unless_told_otherwise():
    def codecs(**options):
        return [coding.codec for coding in directions(moe_a2a_compress="birdmoe", **options)]

    assert codecs() == ["rq", "rq"]
    assert codecs(moe_a2a_bits=5) == ["rq", "rq"]
    assert codecs(moe_a2a_bits=4) == ["dithered", "dithered"]
    assert codecs(moe_a2a_bits=3) == codecs(moe_a2a_bits=2) == ["gaussian", "dithered"]
    assert codecs(moe_a2a_bits=3, moe_a2a_codec="rq") == ["rq", "rq"]
    assert codecs(moe_a2a_bits=3, moe_a2a_backward_codec="rq") == ["gaussian", "rq"]
    assert codecs(moe_a2a_bits=3, moe_a2a_backward_bits=5) == ["gaussian", "rq"]
    assert codecs(moe_a2a_bits=5, moe_a2a_backward_bits=3) == ["rq", "dithered"]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"compress": "gaussian", "bits": 6}, ("--moe-a2a-bits=6", "gaussian has 2 to 4", "Use 2")),
        ({"compress": "rq", "backward_bits": 9}, ("--moe-a2a-backward-bits=9", "2 to 8")),
        (
            {"compress": "rq", "backward_codec": "gaussian"},
            (
                "--moe-a2a-bits=6",
                "--moe-a2a-backward-codec=gaussian",
                "set --moe-a2a-backward-bits",
            ),
        ),
        (
            {"compress": "rq", "backward_codec": "gaussian", "backward_bits": 5},
            ("--moe-a2a-backward-bits=5", "--moe-a2a-backward-codec=gaussian", "Use 2 to 4"),
        ),
        (
            {"compress": "rq", "backward_codec": "fp8"},
            ("backward-codec=fp8", "fixed", "Use one of"),
        ),
        ({"compress": "rq", "backward_codec": "no"}, ("backward-codec=no", "identity, rq")),
        ({"compress": "fp8", "backward_codec": "rq"}, ("backward-codec=rq", "fp8 has a fixed")),
        ({"compress": "lsh", "backward_bits": 4}, ("--moe-a2a-backward-bits=4", "identity has a")),
        (
            {"compress": "birdmoe", "backward_bits": 3, "min_bits": 4},
            ("--moe-a2a-backward-bits=3", "--moe-a2a-min-bits=4"),
        ),
        (
            {"compress": "birdmoe", "codec": "gaussian", "max_bits": 8},
            ("--moe-a2a-max-bits=8", "birdmoe with --moe-a2a-codec=gaussian", "2 to 4"),
        ),
        (
            {"compress": "birdmoe", "bits": 3, "max_bits": 8},
            ("--moe-a2a-max-bits=8", "birdmoe at 3 bits, gaussian", "2 to 4", "--moe-a2a-codec=rq"),
        ),
        (
            {"compress": "birdmoe", "bits": 3, "backward_bits": 9},
            ("--moe-a2a-backward-bits=9", "2 to 8", "--moe-a2a-compress=none"),
        ),
        (
            {"compress": "birdmoe", "bits": 4, "scale_per": "chunk"},
            ("--moe-a2a-scale-per=chunk", "encodes with dithered", "use --moe-a2a-codec=rq"),
        ),
        (
            {"compress": "rq", "backward_codec": "dithered", "scale_per": "chunk"},
            ("--moe-a2a-scale-per=chunk", "encodes with dithered", "Drop"),
        ),
        (
            {"compress": "rq", "backward_codec": "lq", "chunks": 2},
            ("--moe-a2a-chunks=2", "another"),
        ),
    ],
)
def test_what_a_direction_cannot_have_is_refused(options, parts):
    with pytest.raises(ValueError, match=r"Use |use |Drop |Choose ") as caught:
        CompressionConfig(**{f"moe_a2a_{name}": value for name, value in options.items()})
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((), ()),
        (("dispatch_bwd", "combine_fwd"), ("combine_fwd", "dispatch_bwd")),
        (("dispatch_fwd,combine_bwd",), ("dispatch_fwd", "combine_bwd")),
        (WIRES, WIRES),
    ],
)
def test_wires_are_a_set(given, expected):
    assert CompressionConfig(moe_a2a_wires=given).moe_a2a_wires == expected


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"moe_token_dispatcher_type": "flex"}, ("--moe-token-dispatcher-type=flex", "alltoall")),
        ({"moe_token_dispatcher_type": "allgather"}, ("=allgather", "alltoall")),
        ({"moe_shared_expert_overlap": True}, ("--moe-shared-expert-overlap", "Drop")),
        ({"cuda_graph_impl": "local"}, ("--cuda-graph-impl=local", "none")),
        ({"overlap_moe_expert_parallel_comm": True}, ("--overlap-moe-expert", "Drop")),
        ({"overlap_dispatch_backward_with_experts_wgrad": True}, ("--overlap-dispatch", "Drop")),
        (
            {"transformer_impl": "inference_optimized"},
            ("--transformer-impl=inference_opt", "local"),
        ),
        ({"mtp_num_layers": 1}, ("--mtp-num-layers=1", "Drop")),
        ({"moe_expert_rank_capacity_factor": 1.5}, ("--moe-expert-rank-capacity-factor=1.5",)),
        ({"hidden_size": 260}, ("--hidden-size=260", "multiple of 8", "--hidden-size=264")),
        ({"moe_latent_size": 100}, ("--moe-latent-size=100", "multiple of 8", "=104")),
    ],
)
def test_model_options_that_cannot_work_are_refused(changes, parts):
    with pytest.raises(ValueError, match="--moe-a2a-compress=birdmoe") as caught:
        CompressionConfig(moe_a2a_compress="birdmoe").check_model(model(**changes))
    assert all(part in str(caught.value) for part in parts)
    CompressionConfig(moe_a2a_compress="none").check_model(model(**changes))


@pytest.mark.parametrize(
    "option", ["moe_pad_expert_input_to_capacity", "moe_router_padding_for_quantization"]
)
def test_dedup_refuses_padding(option):
    options = model(**{option: True})
    name = "--" + option.replace("_", "-")
    with pytest.raises(ValueError, match=rf"{name}: .*--moe-a2a-dedup .*Drop the option"):
        CompressionConfig(moe_a2a_compress="rq", moe_a2a_dedup=True).check_model(options)
    CompressionConfig(moe_a2a_compress="rq").check_model(options)


def test_nodes_must_divide_the_ranks():
    config = CompressionConfig(
        moe_a2a_compress="rq", moe_a2a_scope="inter-node", moe_a2a_ranks_per_node=4
    )
    config.check_model(model(world_size=8))
    with pytest.raises(ValueError, match=r"ranks-per-node=4: 6 ranks .* Use a divisor of 6"):
        config.check_model(model(world_size=6))
    replace(config, moe_a2a_scope="remote").check_model(model(world_size=6))


def test_a_fitting_model_is_accepted():
    CompressionConfig(moe_a2a_compress="birdmoe").check_model(model())


def test_every_field_has_a_flag_of_its_own_name():
    names = {f.name for f in fields(CompressionConfig)}
    of_lsh = {f.name for f in fields(LshOptions)}
    assert of_lsh < names
    assert all(name.startswith("moe_lsh_") for name in of_lsh)
    assert all(name.startswith("moe_a2a_") for name in names - of_lsh)


def lsh(**options):
    return CompressionConfig(moe_a2a_compress="lsh", **options)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"moe_lsh_hash": "minhash"}, ("--moe-lsh-hash=minhash", "fast-cross-polytope, cross")),
        ({"moe_lsh_residual": "one"}, ("--moe-lsh-residual=one", "none, identity")),
        ({"moe_lsh_scope": "local"}, ("--moe-lsh-scope=local", "all, remote, inter-node")),
        ({"moe_lsh_num_hashes": 0}, ("--moe-lsh-num-hashes=0", "Use 1 to 64")),
        ({"moe_lsh_num_hashes": 65}, ("--moe-lsh-num-hashes=65", "Use 1 to 64")),
        ({"moe_lsh_hash_dim": 0}, ("--moe-lsh-hash-dim=0", "Use 1 to 32768")),
        ({"moe_lsh_hash_dim": 2**15 + 1}, ("--moe-lsh-hash-dim=32769", "Use 1 to 32768")),
        ({"moe_lsh_target_rate": 0.0}, ("--moe-lsh-target-rate=0.0", "above 0", "Use a value")),
        ({"moe_lsh_target_rate": -0.2}, ("--moe-lsh-target-rate=-0.2", "above 0")),
        ({"moe_lsh_target_rate": 1.01}, ("--moe-lsh-target-rate=1.01", "up to 1")),
        ({"moe_lsh_target_rate": math.nan}, ("--moe-lsh-target-rate=nan", "up to 1")),
        ({"moe_lsh_warmup_iters": -1}, ("--moe-lsh-warmup-iters=-1", "negative", "Use 0")),
        (
            {"moe_lsh_warmup_iters": 9, "moe_lsh_num_hashes": 4},
            ("--moe-lsh-warmup-iters=9", "fixed number", "Set --moe-lsh-target-rate"),
        ),
        ({"moe_lsh_scope": "inter-node"}, ("--moe-lsh-scope=inter-node", "ranks-per-node")),
        ({"moe_a2a_dedup": True}, ("--moe-a2a-dedup", "compress=lsh", "Drop the option")),
        ({"moe_a2a_codec": "lsh"}, ("--moe-a2a-codec=lsh", "identity, rq", "Choose")),
        ({"moe_a2a_bits": 4}, ("--moe-a2a-bits=4", "lsh with --moe-a2a-codec=identity", "fixed")),
        (
            {"moe_a2a_codec": "pwlq", "moe_a2a_bits": 2},
            ("--moe-a2a-bits=2", "--moe-a2a-codec=pwlq", "3 to 8"),
        ),
        ({"moe_a2a_codec": "lq", "moe_a2a_chunks": 2}, ("--moe-a2a-chunks=2", "codec=lq")),
        ({"moe_a2a_scale_per": "chunk"}, ("--moe-a2a-scale-per=chunk", "codec=identity")),
    ],
)
def test_a_bad_value_of_lsh_is_refused(changes, parts):
    with pytest.raises(ValueError, match=r"Use |use |Choose |Set |Drop ") as caught:
        lsh(**changes)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    ("given", "resolved"),
    [
        ({}, (6, 16, 0.2)),
        ({"hash": "cross-polytope"}, (6, 16, 0.2)),
        ({"hash": "random"}, (6, 16, 0.2)),
        ({"hash": "spherical"}, (6, 5, 0.2)),
        ({"hash": "spherical", "hash_dim": 9}, (6, 9, 0.2)),
        ({"num_hashes": 3}, (3, 16, None)),
        ({"num_hashes": 3, "target_rate": 0.4}, (3, 16, 0.4)),
        ({"target_rate": 1}, (6, 16, 1)),
        ({"warmup_iters": 5}, (6, 16, 0.2)),
    ],
)
def test_what_lsh_is_not_given_follows(given, resolved):
    config = lsh(**{f"moe_lsh_{name}": value for name, value in given.items()})
    found = (config.moe_lsh_num_hashes, config.moe_lsh_hash_dim, config.moe_lsh_target_rate)
    assert found == resolved
    assert replace(config) == config


def test_codecs_of_lsh_resolve_their_bits():
    config = lsh(moe_a2a_codec="rq")
    assert (config.moe_a2a_bits, config.moe_a2a_bit_policy) == (6, "uniform")
    config = lsh(moe_a2a_codec="rq", moe_a2a_bit_policy="optimal", moe_a2a_bits=4)
    assert config.forward == Coding("rq", 4, 2, 8)
    assert (lsh().moe_a2a_bits, lsh().moe_a2a_bit_policy) == (None, "uniform")


OTHER_VALUES = {
    "moe_lsh_hash": "spherical",
    "moe_lsh_num_hashes": 3,
    "moe_lsh_hash_dim": 8,
    "moe_lsh_target_rate": 0.5,
    "moe_lsh_warmup_iters": 10,
    "moe_lsh_refine": 2,
    "moe_lsh_center": True,
    "moe_lsh_residual": "identity",
    "moe_lsh_scope": "remote",
    "moe_lsh_eval": True,
}


@pytest.mark.parametrize("name", [f.name for f in fields(LshOptions)])
def test_options_of_lsh_are_refused_with_other_methods(name):
    option = {name: OTHER_VALUES[name]}
    flag = "--" + name.replace("_", "-")
    for method in ("birdmoe", "fp8"):
        remedy = f"{flag}.*--moe-a2a-compress={method} .* use --moe-a2a-compress=lsh"
        with pytest.raises(ValueError, match=remedy):
            CompressionConfig(moe_a2a_compress=method, **option)
    assert getattr(CompressionConfig(moe_a2a_compress="none", **option), name) == option[name]
    assert getattr(lsh(**{"moe_lsh_target_rate": 0.5} | option), name) == option[name]


@pytest.mark.parametrize("method", ["rq", "identity"])
def test_only_lsh_and_birdmoe_choose_their_codec(method):
    with pytest.raises(ValueError, match=r"--moe-a2a-codec=fp8: .* use --moe-a2a-compress=lsh"):
        CompressionConfig(moe_a2a_compress=method, moe_a2a_codec="fp8")
    with pytest.raises(ValueError, match=r"--moe-a2a-codec=fp8: has a fixed width.* Use one of"):
        CompressionConfig(moe_a2a_compress="birdmoe", moe_a2a_codec="fp8")
    CompressionConfig(moe_a2a_compress="none", moe_a2a_codec="fp8")


@pytest.mark.parametrize("scope", ["moe_a2a_scope", "moe_lsh_scope"])
def test_either_scope_needs_to_know_the_nodes(scope):
    config = lsh(**{scope: "inter-node"}, moe_a2a_ranks_per_node=2)
    assert config.inter_node_option == f"--{scope.replace('_', '-')}=inter-node"
    assert lsh().inter_node_option is None


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"moe_pad_expert_input_to_capacity": True}, ("--moe-pad-expert-input", "Drop")),
        ({"moe_router_padding_for_quantization": True}, ("padding-for-quantization", "Drop")),
        ({"moe_apply_probs_on_input": True}, ("--moe-apply-probs-on-input", "Drop")),
        ({"moe_token_dispatcher_type": "flex"}, ("--moe-token-dispatcher-type=flex", "Use ")),
        ({"hidden_size": 8}, ("--moe-lsh-hash-dim=16", "--hidden-size=8", "Use 1 to 8")),
        ({"moe_latent_size": 8}, ("--moe-lsh-hash-dim=16", "--moe-latent-size=8", "Use 1 to 8")),
    ],
)
def test_what_lsh_cannot_work_with_is_refused(changes, parts):
    with pytest.raises(ValueError, match=r"Drop|Use") as caught:
        lsh().check_model(model(**changes))
    assert all(part in str(caught.value) for part in parts)
    lsh(moe_lsh_hash_dim=8).check_model(model(hidden_size=8))


def test_others_work_with_what_lsh_does_not():
    options = model(moe_apply_probs_on_input=True, moe_router_padding_for_quantization=True)
    CompressionConfig(moe_a2a_compress="rq").check_model(options)
    lsh().check_model(model(moe_router_padding_for_quantization=None))
