from argparse import Namespace
from dataclasses import fields

import pytest

from megatron_moe_comp.config import WIRES, CompressionConfig

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
        ({"moe_a2a_compress": "zip"}, ("--moe-a2a-compress=zip", "none, birdmoe")),
        ({"moe_a2a_bits": 1}, ("--moe-a2a-bits=1", "2 to 8")),
        ({"moe_a2a_bits": 9}, ("--moe-a2a-bits=9", "2 to 8")),
        ({"moe_a2a_scale_per": "tensor"}, ("--moe-a2a-scale-per=tensor", "row, chunk")),
        ({"moe_a2a_wires": ("dispatch",)}, ("--moe-a2a-wires=dispatch", "dispatch_fwd")),
        ({"moe_a2a_seed": -1}, ("--moe-a2a-seed=-1", "0 to 4294967295")),
        ({"moe_a2a_seed": 2**32}, ("--moe-a2a-seed=4294967296", "0 to 4294967295")),
    ],
)
def test_a_bad_value_is_refused_with_option_requirement_and_remedy(changes, parts):
    with pytest.raises(ValueError, match=r"Use |Choose ") as caught:
        CompressionConfig(**changes)
    assert all(part in str(caught.value) for part in parts)


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


def test_a_fitting_model_is_accepted():
    CompressionConfig(moe_a2a_compress="birdmoe").check_model(model())


def test_every_field_has_a_flag_of_its_own_name():
    assert all(f.name.startswith("moe_a2a_") for f in fields(CompressionConfig))
