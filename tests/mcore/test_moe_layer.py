"""CompressedMoELayer against Megatron's MoELayer, on the stock dispatcher's own terms."""

from functools import partial
from typing import get_args

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_moe_comp.compression.wires import WIRES
from megatron_moe_comp.options.codec_options import BitPolicy
from megatron_moe_comp.options.config import CompressionConfig
from megatron_moe_comp.stats.comm_stats import Column
from tests.gloo import watched_all_to_alls

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
    megatron_pool.run(is_close_to_stock, model, routing, {"method": "rq", "moe_a2a_bits": 8}, 0.1)


@pytest.mark.parametrize("wire", WIRES)
def test_each_wire_alone(megatron_pool, wire):
    options = {"method": "rq", "moe_a2a_bits": 8, "moe_a2a_wires": (wire,)}
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


@pytest.mark.parametrize(
    "options",
    [
        {"moe_a2a_bits": 3},
        {"moe_a2a_bits": 6},
        {"moe_a2a_dedup": True},
        {"moe_a2a_chunks": 3},
        {"moe_a2a_codec": "dithered", "moe_a2a_chunks": 2},
    ],
)
def test_recomputation_repeats_the_bits(megatron_pool, options):
    megatron_pool.run(recompute_repeats, options)


def pieces_change_nothing(rank, options):
    whole = run(compressed(make_config(), **options), rank=rank)
    for pieces in (2, 7):
        cut = compressed(make_config(), moe_a2a_chunks=pieces, **options)
        assert_same_bits(run(cut, rank=rank), whole)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"moe_a2a_dedup": True},
        {"method": "rq"},
        {"method": "identity"},
        {"moe_a2a_codec": "dithered", "moe_a2a_dedup": True},
    ],
)
def test_pieces_change_nothing(megatron_pool, options):
    megatron_pool.run(pieces_change_nothing, options)


def preprocess_equals_stock(rank, model):
    config = make_config(**MODELS[model])
    ours, theirs = compressed(config).token_dispatcher, stock(config).token_dispatcher
    generator = torch.Generator().manual_seed(rank)
    for density in (0.0, 0.2, 1.0):
        routing_map = torch.rand(TOKENS, EXPERTS, generator=generator) < density
        results = [d.preprocess(routing_map) for d in (ours, theirs)]
        assert torch.equal(*results)
        for name in theirs.cudagraph_attrs:
            mine, stocks = (getattr(d, name, None) for d in (ours, theirs))
            assert type(mine) is type(stocks), name
            assert (
                torch.equal(torch.as_tensor(mine), torch.as_tensor(stocks))
                if (stocks is not None)
                else mine is None
            ), name
        assert ours.cuda_sync_point == theirs.cuda_sync_point


@pytest.mark.parametrize("model", MODELS)
def test_preprocess_equals_stocks(megatron_pool, model):
    megatron_pool.run(preprocess_equals_stock, model)


class Collectives(TorchDispatchMode):
    """Notes the names of the collectives that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def beside_rows(self):
        """The names but those that move rows, by stock or by exchange() on gloo."""
        return [name for name in self.names if not name.startswith(("alltoall", "send", "recv_"))]


def collectives(rank, options):
    layer = compressed(make_config(), **options) if options else stock(make_config())
    with Collectives() as found:
        layer(torch.rand(TOKENS, BATCH, HIDDEN))
    return found.beside_rows()


def test_load_aware_bits_and_dedup_need_no_further_collective(megatron_pool):
    stocks = megatron_pool.run(collectives, {})
    assert any(stocks)
    for options in ({"moe_a2a_bit_policy": "optimal"}, {"moe_a2a_dedup": True}):
        assert megatron_pool.run(collectives, {"method": "birdmoe"} | options) == stocks


def one_rank_is_larger(rank, options, factor):
    """Relative errors on this rank; rank 0 has `factor` times larger inputs and gradients."""
    config = make_config()
    generator = torch.Generator().manual_seed(10 + rank)
    scale = factor if rank == 0 else 1.0
    x = torch.randn(TOKENS, BATCH, HIDDEN, generator=generator) * scale
    weights = torch.randn(TOKENS, BATCH, HIDDEN, generator=generator) * scale
    results = []
    for layer in (stock(config), compressed(config, **options)):
        inputs = x.clone().requires_grad_()
        output, _ = layer(inputs)
        (output * weights).sum().backward()
        results.append((output.detach(), inputs.grad))
    return [relative(ours, theirs) for theirs, ours in zip(*results, strict=True)]


@pytest.mark.parametrize("options", [{"method": "birdmoe"}, {"method": "rq", "moe_a2a_bits": 4}])
def test_a_rank_with_8x_larger_activations_degrades_no_other(megatron_pool, options):
    equal = megatron_pool.run(one_rank_is_larger, options, 1.0)
    larger = megatron_pool.run(one_rank_is_larger, options, 8.0)
    for rank in range(1, len(equal)):
        for before, after in zip(equal[rank], larger[rank], strict=True):
            assert after < 1.25 * before + 1e-3, (rank, before, after)
    # The larger rank's own error stays what the bits allow.
    assert max(larger[0]) < 2 * max(equal[0])


def load_of_policies(rank, routing):
    """Figures of each bit policy, of all ranks alike, and its bits."""
    results = {}
    for policy in get_args(BitPolicy):
        layer = compressed(make_config(), moe_a2a_bits=6, moe_a2a_bit_policy=policy)
        allocated = []
        with_bits = layer.token_dispatcher._with_bits
        layer.token_dispatcher._with_bits = lambda *args, keep=allocated, call=with_bits: (
            keep.append(call(*args)) or keep[0]
        )
        run(layer, routing, rank)
        totals = layer.stats.totals()
        assert (totals[:, Column.PASSES] == 1).all()
        # The way back mirrors the way there, but for nothing: codes and scales alone count.
        assert torch.equal(totals[:1, Column.LOAD], totals[3:, Column.LOAD])
        results[policy] = totals[0, Column.LOAD_RAW : Column.LOAD + 1].tolist(), allocated[0]
    return results


@pytest.mark.parametrize("routing", ROUTINGS)
def test_bit_policies_shift_the_load(megatron_pool, routing):
    results = megatron_pool.run(load_of_policies, routing)
    for policy, (figures, links) in results[0].items():
        raw, uniform, sent = figures
        for other in results[1:]:
            assert other[policy][0] == figures
            assert torch.equal(other[policy][1].bits[0], links.bits[0])
        crossing = links.rows.clone().fill_diagonal_(0)
        rows = max(crossing.sum(dim=0).max(), crossing.sum(dim=1).max()).item()
        assert raw == rows * 4 * HIDDEN
        assert uniform == rows * (6 * HIDDEN // 8 + 4)
        if policy == "uniform":
            assert sent == uniform
        elif policy == "optimal" and crossing.any():
            budget = 6 * crossing.sum().item() / len(crossing)
            most = max((crossing * links.bits[0]).sum(dim=d).max().item() for d in (0, 1))
            assert most <= budget or (links.bits[0][crossing > 0] == 3).any()
            assert sent <= uniform
    if routing == "one rank gets all" and len(results) == 4:
        raw, uniform, sent = results[0]["optimal"][0]
        assert sent < 0.65 * uniform


def rows_within_a_node(rank):
    """Nodes of two ranks; with four, only rows between the pairs are compressed."""
    options = {"method": "rq", "moe_a2a_bits": 4}
    layer = compressed(
        make_config(), moe_a2a_scope="inter-node", moe_a2a_ranks_per_node=2, **options
    )
    everything = compressed(make_config(), moe_a2a_ranks_per_node=1, **options)
    ours, others = (run(chosen, rank=rank) for chosen in (layer, everything))
    assert not torch.equal(ours[0], others[0])
    inter_node, all_remote = (chosen.stats.totals().sum(dim=0) for chosen in (layer, everything))
    assert 0 < inter_node[Column.ROWS_4_BITS] < all_remote[Column.ROWS_4_BITS]
    assert inter_node[Column.ROWS] == all_remote[Column.ROWS] == all_remote[Column.ROWS_4_BITS]
    assert inter_node[Column.RAW] > inter_node[Column.WIRE] > all_remote[Column.WIRE]
    # A node of one carries what its rank does.
    columns = [Column.LOAD_RAW, Column.NODE_LOAD_RAW]
    of_one, of_two = (counted[columns].tolist() for counted in (all_remote, inter_node))
    assert of_one[0] == of_one[1] == of_two[0]
    assert 0 < of_two[1] != of_two[0]


def one_node(rank):
    size = dist.get_world_size()
    try:
        compressed(make_config(), moe_a2a_scope="inter-node", moe_a2a_ranks_per_node=size)
    except ValueError as error:
        return str(error)
    return ""


def test_inter_node_scope(megatron_pool):
    messages = megatron_pool.run(one_node)
    assert all("--moe-a2a-scope=inter-node: all" in message for message in messages)
    if len(messages) == 4:
        megatron_pool.run(rows_within_a_node)


def same_seed_same_bits(rank):
    config = make_config()
    first = run(compressed(config, moe_a2a_bits=4), rank=rank)
    assert_same_bits(run(compressed(config, moe_a2a_bits=4), rank=rank), first)
    other = run(compressed(config, moe_a2a_bits=4, iteration=1), rank=rank)
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
    wires = ("combine_fwd", "dispatch_bwd")
    options = {"method": "rq", "moe_a2a_bits": 3, "moe_a2a_wires": wires}
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


def counts(rank, method, **options):
    """Counted bytes against those handed to torch.distributed."""
    layer = compressed(make_config(), method, **options)
    with watched_all_to_alls(rank) as handed:
        run(layer, rank=rank)
    totals = layer.stats.totals().sum(dim=0)
    return len(handed), sum(handed), int(totals[Column.WIRE]), int(totals[Column.RAW])


def test_counted_bytes_are_those_handed_to_the_collectives(megatron_pool):
    for method, messages in (("none", 6), ("rq", 4)):
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
    assert before[:, Column.WIRE].all()


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
