"""CompressedMoELayer against Megatron's MoELayer, on the stock dispatcher's own terms."""

from functools import partial

import pytest
import torch
import torch.distributed as dist

from megatron_moe_comp.config import WIRES, CompressionConfig

HIDDEN, EXPERTS, TOKENS, BATCH = 64, 8, 24, 2

MODELS = {
    "top2": {},
    "top1": {"moe_router_topk": 1, "moe_router_pre_softmax": True},
    "top4 of bfloat16": {"moe_router_topk": 4, "bf16": True, "params_dtype": torch.bfloat16},
    "capacity": {"moe_expert_capacity_factor": 1.0, "moe_token_drop_policy": "probs"},
    "padded to capacity": {
        "moe_expert_capacity_factor": 1.0,
        "moe_pad_expert_input_to_capacity": True,
    },
    "shared experts": {"moe_shared_expert_intermediate_size": 32},
    "router in float64": {"moe_router_dtype": "fp64"},
}
ROUTINGS = ("learned", "one rank gets all", "a rank gets none")


def make_config(**changes):
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        **{
            "num_layers": 2,
            "hidden_size": HIDDEN,
            "ffn_hidden_size": 96,
            "num_attention_heads": 4,
            "num_moe_experts": EXPERTS,
            "expert_model_parallel_size": dist.get_world_size(),
            "moe_router_topk": 2,
            "moe_token_dispatcher_type": "alltoall",
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": 1e-2,
            "add_bias_linear": False,
            "hidden_dropout": 0.0,
            "perform_initialization": True,
        }
        | changes
    )


def build(config, layer_class):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    model_parallel_cuda_manual_seed(1)
    spec = get_gpt_layer_local_spec(num_experts=EXPERTS).submodules.mlp
    layer = layer_class(
        config=config,
        pg_collection=get_default_pg_collection(),
        is_mtp_layer=False,
        **spec.keywords,
    )
    layer.set_layer_number(1)
    return layer


def compressed(config, method="birdmoe", iteration=0, **options):
    from megatron_moe_comp.compression.random_stream import TrainingStep
    from megatron_moe_comp.mcore.moe_layer import CompressedMoELayer

    compression = CompressionConfig(moe_a2a_compress=method, moe_a2a_seed=1, **options)
    step = TrainingStep(iteration=iteration, num_microbatches=1)
    return build(config, partial(CompressedMoELayer, compression=compression, step=lambda: step))


def stock(config):
    from megatron.core.transformer.moe.moe_layer import MoELayer

    return build(config, MoELayer)


def steer(layer, routing):
    """Makes the router prefer experts: the weight row of expert e is scaled, the input positive."""
    experts = torch.arange(EXPERTS, dtype=torch.float32)
    per_rank = EXPERTS // dist.get_world_size()
    if routing == "one rank gets all":
        preference = (experts < per_rank).float() * 20
    elif routing == "a rank gets none":
        preference = (experts >= per_rank).float() * 20
    else:
        return
    with torch.no_grad():
        layer.router.weight.mul_(0.01).add_(preference[:, None] / HIDDEN)


def run(layer, routing="learned", rank=0):
    """Returns output and every gradient of one forward and backward pass."""
    steer(layer, routing)
    config = layer.config
    generator = torch.Generator().manual_seed(10 + rank)
    x = torch.rand(TOKENS, BATCH, HIDDEN, generator=generator) * 2.0**rank
    weights = torch.randn(TOKENS, BATCH, HIDDEN, generator=generator) * 3.0**-rank
    x = x.to(config.params_dtype).requires_grad_()
    output, bias = layer(x)
    assert bias is None
    (output.float() * weights).sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    return output.detach(), x.grad, grads


def assert_same_bits(ours, theirs):
    for a, b in ((ours[0], theirs[0]), (ours[1], theirs[1])):
        assert torch.equal(a, b), f"max difference {(a - b).abs().max()}"
    assert ours[2].keys() == theirs[2].keys()
    for name, grad in theirs[2].items():
        if grad is None:
            assert ours[2][name] is None, name
        else:
            assert torch.equal(ours[2][name], grad), name


def equals_stock(rank, model, routing, method, options):
    config = make_config(**MODELS[model])
    theirs = run(stock(config), routing, rank)
    assert_same_bits(run(compressed(config, method, **options), routing, rank), theirs)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("model", MODELS)
def test_none_equals_stock_bit_for_bit(megatron_pool, model, routing):
    megatron_pool.run(equals_stock, model, routing, "none", {})


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("model", MODELS)
def test_no_wire_compressed_equals_stock_bit_for_bit(megatron_pool, model, routing):
    megatron_pool.run(equals_stock, model, routing, "birdmoe", {"moe_a2a_wires": ()})


def relative(a, b):
    return ((a - b).norm() / b.norm()).item() if b.norm() else (a.norm() != 0).item()


def is_close_to_stock(rank, model, routing, options, bound):
    config = make_config(**MODELS[model])
    theirs = run(stock(config), routing, rank)
    ours = run(compressed(config, **options), routing, rank)
    assert relative(ours[0].float(), theirs[0].float()) < bound
    assert relative(ours[1].float(), theirs[1].float()) < bound
    for name, grad in theirs[2].items():
        assert (grad is None) == (ours[2][name] is None), name
        if grad is not None:
            assert relative(ours[2][name].float(), grad.float()) < bound, name
    if routing == "learned":
        assert not torch.equal(ours[1], theirs[1]), "nothing was compressed"


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("model", MODELS)
def test_eight_bits_are_close_to_stock_and_every_gradient_exists(megatron_pool, model, routing):
    megatron_pool.run(is_close_to_stock, model, routing, {"moe_a2a_bits": 8}, 0.1)


@pytest.mark.parametrize("wire", WIRES)
def test_each_wire_alone(megatron_pool, wire):
    options = {"moe_a2a_bits": 8, "moe_a2a_wires": (wire,)}
    megatron_pool.run(only_this_wire_differs, wire, options)


def only_this_wire_differs(rank, wire, options):
    config = make_config()
    theirs, ours = run(stock(config), rank=rank), run(compressed(config, **options), rank=rank)
    assert torch.equal(ours[0], theirs[0]) == wire.endswith("bwd")
    experts = [n for n, g in theirs[2].items() if "experts" in n and g is not None and g.any()]
    same_expert_gradients = all(torch.equal(ours[2][n], theirs[2][n]) for n in experts)
    assert same_expert_gradients == (wire in ("dispatch_bwd", "combine_fwd"))
    assert torch.equal(ours[1], theirs[1]) == (wire == "combine_fwd")


def recompute_repeats(rank, options):
    without = run(compressed(make_config(), **options), rank=rank)
    recomputing = make_config(recompute_granularity="selective", recompute_modules=["moe"])
    assert_same_bits(run(compressed(recomputing, **options), rank=rank), without)


@pytest.mark.parametrize("num_bits", [2, 6])
def test_recomputation_repeats_the_bits(megatron_pool, num_bits):
    megatron_pool.run(recompute_repeats, {"moe_a2a_bits": num_bits})


def same_seed_same_bits(rank):
    config = make_config()
    first = run(compressed(config, moe_a2a_bits=3), rank=rank)
    assert_same_bits(run(compressed(config, moe_a2a_bits=3), rank=rank), first)
    other = run(compressed(config, moe_a2a_bits=3, iteration=1), rank=rank)
    assert not torch.equal(first[0], other[0])


def test_same_seed_same_bits_and_another_iteration_other_bits(megatron_pool):
    megatron_pool.run(same_seed_same_bits)


def mean_over_iterations(rank, draws):
    """The mean of many 3-bit passes nears the exact one: unbiased through the whole layer.

    Only the combine, after which nothing is nonlinear: the experts' mean is not that of their
    inputs.
    """
    config = make_config()
    theirs = run(stock(config), rank=rank)
    options = {"moe_a2a_bits": 3, "moe_a2a_wires": ("combine_fwd", "dispatch_bwd")}
    output, gradient, spread = 0, 0, 0
    for iteration in range(draws):
        ours = run(compressed(config, iteration=iteration, **options), rank=rank)
        output, gradient = output + ours[0] / draws, gradient + ours[1] / draws
        spread = spread + (ours[0] - theirs[0]).square().sum() / draws
    error = (output - theirs[0]).square().sum()
    assert error < 1.5 * spread / draws, (error, spread / draws)
    assert relative(gradient, theirs[1]) < 0.1


def test_the_layer_is_unbiased(megatron_pool):
    megatron_pool.run(mean_over_iterations, 60)


def counts(rank, method):
    """Counted bytes against those handed to torch.distributed."""
    handed = []
    original = dist.all_to_all_single

    def spy(output, values, output_split_sizes=None, input_split_sizes=None, group=None, **kwargs):
        splits = input_split_sizes
        if splits is None:
            splits = [len(values) // dist.get_world_size()] * dist.get_world_size()
        row = values[:1].numel() * values.element_size() if len(values) else 0
        handed.append((sum(splits) - splits[rank]) * row)
        return original(output, values, output_split_sizes, input_split_sizes, group, **kwargs)

    layer = compressed(make_config(), method, moe_a2a_bits=6)
    dist.all_to_all_single = spy
    try:
        run(layer, rank=rank)
    finally:
        dist.all_to_all_single = original
    totals = layer.stats.totals()
    return len(handed), sum(handed), int(totals[:, 1].sum()), int(totals[:, 0].sum())


def test_counted_bytes_are_those_handed_to_the_collectives(megatron_pool):
    for method, messages in (("none", 6), ("birdmoe", 4)):
        for found, handed, counted, raw in megatron_pool.run(counts, method):
            assert found == messages
            assert counted == handed
            assert raw == handed if method == "none" else raw > 4 * handed


def evaluation_is_not_counted(rank):
    layer = compressed(make_config())
    run(layer, rank=rank)
    before = layer.stats.totals()
    layer.eval()
    with torch.no_grad():
        layer(torch.rand(TOKENS, BATCH, HIDDEN))
    assert torch.equal(layer.stats.totals(), before)
    assert before[:, 1].all()


def test_evaluation_is_not_counted(megatron_pool):
    megatron_pool.run(evaluation_is_not_counted)


def refuses(rank, changes):
    try:
        compressed(make_config(**changes))
    except ValueError as error:
        return str(error)
    return ""


def test_unsupported_options_are_refused_on_every_rank(megatron_pool):
    for message in megatron_pool.run(refuses, {"moe_token_dispatcher_type": "allgather"}):
        assert "--moe-token-dispatcher-type=allgather" in message


def other_dispatcher(rank):
    config = make_config(moe_token_dispatcher_type="allgather")
    ours, theirs = compressed(config, "none"), stock(config)
    assert type(ours.token_dispatcher) is type(theirs.token_dispatcher)
    assert ours.stats is None
    assert_same_bits(run(ours, rank=rank), run(theirs, rank=rank))


def test_none_leaves_other_dispatchers_alone(megatron_pool):
    megatron_pool.run(other_dispatcher)
