"""Models with experts that start from dense checkpoints: at first they compute the same."""

from functools import partial

import pytest
import torch

from tests.saved_models import (
    ALTERNATE,
    DENSE,
    LENGTH,
    SWIGLU,
    T5,
    UNTIED,
    VOCABULARY,
    build,
    make_config,
    save,
)

BATCH = 2
BIASES = {"add_bias_linear": True}


def logits(models):
    """Returns the output for fixed tokens, or None on ranks without the last stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import unwrap_model

    from megatron_moe_comp.tasks.t5.model import T5MoEModel

    random = torch.Generator().manual_seed(5)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=random)
    for model in models:
        model.eval()
    (model,) = unwrap_model(models)
    if isinstance(model, T5MoEModel):
        real = torch.ones_like(tokens, dtype=torch.bool)
        with torch.no_grad():
            return model(tokens, tokens.flip(1), real, real).tolist()
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    mask = torch.ones(LENGTH, LENGTH).triu(1).bool()[None, None]

    def step(_, model):
        return model(tokens, positions, mask), lambda x: (x.sum(), {"logits": x.tolist()})

    reports = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter([None]),
        model=models,
        num_microbatches=1,
        seq_length=LENGTH,
        micro_batch_size=BATCH,
        forward_only=True,
    )
    return reports[0]["logits"] if reports else None


def save_dense(rank, directory, layout, changes, kind):
    """Returns the logits of a dense model that it saves, with no bias zero and no norm one."""
    from megatron.core.utils import unwrap_model

    models = build(make_config(layout, changes | DENSE))
    random = torch.Generator().manual_seed(3)
    for parameter in models[0].parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=random)
    (model,) = unwrap_model(models)
    save(directory, model, kind)
    return logits(models)


def upcycle(rank, directory, layout, changes, resumed=None):
    """Returns the upcycled model's logits, what was printed, and which weights it copied."""
    from megatron_moe_comp.training import upcycling
    from megatron_moe_comp.training.checkpoint_start import CheckpointToLoad

    printed = []
    upcycling.print_rank_0 = printed.append
    found = resumed and CheckpointToLoad("--load", resumed, 1, False, True)
    try:
        config = make_config(layout, changes)
        upcycling.use_upcycling(config, directory, lambda: found)
        models = build(config, seed=2)
        drawn = torch.rand(()).item()
        again = build(make_config(layout, changes), seed=2)
        assert torch.rand(()).item() == drawn, "other random numbers than without upcycling"
        routers = [
            {name: p.tolist() for name, p in models[0].named_parameters() if "router" in name}
            for models in (models, again)
        ]
        assert routers[0] == routers[1]
        return logits(models), printed
    except ValueError as error:
        return str(error), printed


CASES = {
    "one rank": (("one", {}), "one", ALTERNATE),
    "EP 2": (("one", {}), "ep2", ALTERNATE),
    "EP 2, all layers, biases": (("one", BIASES), "ep2", {}),
    "EP 4, file of TP 1": (("one", SWIGLU), "ep4", ALTERNATE, "torch"),
    "PP 2": (("one", SWIGLU), "pp2", {}),
    "TP 2": (("tp2 etp2", SWIGLU | UNTIED), "tp2 etp2", ALTERNATE),
    "TP 2, other layout": (("one", SWIGLU), "tp2 etp2", {}),
    "TP 2, files": (("tp2 etp2", {}), "tp2 etp2 ep2", ALTERNATE, "torch"),
    "T5": (("one", T5 | UNTIED), "ep2", ALTERNATE, "release"),
    "T5, TP 2": (("one", T5 | SWIGLU), "tp2 etp2", ALTERNATE),
    "sigmoid": (("one", {}), "ep2", {"moe_router_score_function": "sigmoid"}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_upcycled_model_computes_what_the_dense_one_does(pools, tmp_path, case):
    (saved, options), layout, experts, *kind = case
    kind = kind[0] if kind else "torch_dist"
    dense = pools(saved).run(save_dense, str(tmp_path), saved, options, kind)[0]
    results = pools(layout).run(upcycle, str(tmp_path), layout, options | experts)
    outputs = [output for output, _ in results if output is not None]
    assert outputs
    assert not isinstance(outputs[0], str), outputs[0]
    for output in outputs:
        torch.testing.assert_close(torch.tensor(output), torch.tensor(dense), rtol=1e-5, atol=1e-5)
    for _, printed in results:
        assert printed == [f"--upcycle-from: experts start as the feed-forwards of {tmp_path}"]


@pytest.fixture(scope="module")
def dense(pools, tmp_path_factory):
    """A dense checkpoint and its logits."""
    directory = str(tmp_path_factory.mktemp("dense"))
    return directory, pools("one").run(save_dense, directory, "one", {}, "torch_dist")[0]


SCALED = {
    "pre-softmax": {"moe_router_pre_softmax": True},
    "top-1": {"moe_router_topk": 1, "moe_router_pre_softmax": True},
    "sigmoid of one": {"moe_router_topk": 1, "moe_router_score_function": "sigmoid"},
    "scaling factor": {"moe_router_topk_scaling_factor": 2.5, "moe_router_pre_softmax": True},
    "sinkhorn": {"moe_router_topk": 1, "moe_router_load_balancing_type": "sinkhorn"},
}


@pytest.mark.parametrize("options", SCALED.values(), ids=SCALED.keys())
def test_routing_that_scales_outputs_is_warned_of(pools, dense, options):
    directory, expected = dense
    output, printed = pools("ep2").run(upcycle, directory, "ep2", options)[0]
    assert not isinstance(output, str), output
    difference = (torch.tensor(output) - torch.tensor(expected)).abs().max()
    assert difference > 1e-3
    assert len(printed) == 2
    assert printed[1].startswith("WARNING: --upcycle-from: at first the model's outputs are not")


def test_all_experts_after_softmax_need_no_warning(pools, dense):
    directory, expected = dense
    options = {"moe_router_topk": 4, "moe_router_pre_softmax": True}
    output, printed = pools("ep2").run(upcycle, directory, "ep2", options)[0]
    torch.testing.assert_close(torch.tensor(output), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert len(printed) == 1


def test_a_checkpoint_of_the_run_itself_comes_first(pools, dense):
    directory, expected = dense
    output, printed = pools("ep2").run(upcycle, directory, "ep2", {}, "elsewhere")[0]
    assert printed == ["--upcycle-from: skipped, since --load elsewhere comes first"]
    assert output != expected


REFUSED = {
    "other experts": (
        "ep2",
        {"moe_ffn_hidden_size": 16},
        (
            "not copied:\n    decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight "
            "[16, 32]: decoder.layers.0.mlp.linear_fc1.weight is [48, 32]",
            "--moe-ffn-hidden-size",
        ),
    ),
    "hidden size": (
        "ep2",
        {"hidden_size": 64},
        ("final_layernorm.weight: [32] in the checkpoint, [64] in the model",),
    ),
    "biases": ("ep2", BIASES, ("missing in the checkpoint, ", "mlp.linear_fc1.bias [2, 48]")),
    "no experts": ("one", DENSE, ("cannot work with no --num-experts. Set it",)),
    "shared experts": (
        "ep2",
        {"moe_shared_expert_intermediate_size": 48},
        ("cannot work with --moe-shared-expert-intermediate-size",),
    ),
    "experts in one part": (
        "tp2",
        {},
        ("--expert-tensor-parallel-size=1. ", "Set --expert-tensor-parallel-size=2."),
    ),
}


@pytest.mark.parametrize(("layout", "options", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(pools, dense, layout, options, words):
    results = pools(layout).run(upcycle, dense[0], layout, options)
    for message, printed in results:
        assert message == results[0][0]
        assert message.startswith(f"--upcycle-from={dense[0]}: ")
        assert not printed
        for word in words:
            assert word in message


def save_experts(rank, directory):
    from megatron.core.utils import unwrap_model

    save(directory, *unwrap_model(build(make_config("ep2", {}))), "torch_dist")


def test_a_checkpoint_with_experts_is_for_load(pools, tmp_path):
    pools("ep2").run(save_experts, str(tmp_path))
    for message, _ in pools("ep2").run(upcycle, str(tmp_path), "ep2", {}):
        assert "not in the model, 3:" in message
        assert "give it to --load" in message


def test_no_checkpoint(pools, tmp_path):
    for message, _ in pools("ep2").run(upcycle, str(tmp_path), "ep2", {}):
        assert "there is no checkpoint" in message


def test_what_has_no_counterpart_is_named():
    from megatron_moe_comp.training.upcycling import copy_parameters

    dense = torch.nn.ModuleDict({"old": torch.nn.Linear(2, 3), "same": torch.nn.Linear(4, 5)})
    experts = torch.nn.ModuleDict({"new": torch.nn.Linear(2, 3), "same": torch.nn.Linear(4, 6)})
    assert sorted(copy_parameters(experts, dense)) == [
        "new.bias [3]: not in the dense model",
        "new.weight [3, 2]: not in the dense model",
        "old.bias of the dense model: not in the model with experts",
        "old.weight of the dense model: not in the model with experts",
        "same.bias [6]: same.bias is [5]",
        "same.weight [6, 4]: same.weight is [5, 4]",
    ]


def test_names_of_transformer_engine():
    from megatron_moe_comp.training.upcycling import source_of

    sources = {
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight": None,
        "decoder.layers.0.mlp.linear_fc1.weight": None,
        "decoder.layers.0.mlp.linear_fc2.bias": None,
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": None,
    }
    source = partial(source_of, sources=sources)
    layer = "decoder.layers.0"
    assert source(f"{layer}.pre_mlp_layernorm.weight").endswith("linear_fc1.layer_norm_weight")
    assert source(f"{layer}.mlp.experts.linear_fc1.weight11") == f"{layer}.mlp.linear_fc1.weight"
    assert source(f"{layer}.mlp.experts.linear_fc2.bias3") == f"{layer}.mlp.linear_fc2.bias"
    assert source(f"{layer}.self_attention.linear_qkv.layer_norm_weight") == list(sources)[3]
    assert source(f"{layer}.mlp.experts.linear_fc1.weight") is None
    assert source("decoder.layers.1.mlp.experts.linear_fc1.weight0") is None
