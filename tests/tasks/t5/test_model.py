"""T5-MoE against a model by hand, and what padding, layer numbers and router losses must be."""

import pytest
import torch
import torch.distributed as dist

from megatron_moe_comp.options.config import CompressionConfig
from megatron_moe_comp.stats.comm_stats import Column
from tests.tasks.t5.t5_reference import Reference, Sizes

HIDDEN, HEADS, EXPERTS, VOCABULARY, LENGTH = 32, 4, 8, 96, 24
STEPS, LEARNING_RATE = 3, 0.05
SIZES = Sizes(num_heads=HEADS, top_k=2, aux_loss_coeff=1e-2)


def model_config(compression=None, num_decoder_layers=2, **changes):
    import copy

    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_moe_comp.compression.random_stream import TrainingStep
    from megatron_moe_comp.mcore.layer_specs import (
        use_compressed_moe,
        use_sequence_parallel_norms,
    )
    from megatron_moe_comp.tasks.t5.model import T5ModelConfig, t5_layer_specs

    decoder = TransformerConfig(
        **{
            "num_layers": num_decoder_layers,
            "hidden_size": HIDDEN,
            "ffn_hidden_size": 48,
            "num_attention_heads": HEADS,
            "num_moe_experts": EXPERTS,
            "expert_model_parallel_size": dist.get_world_size(),
            "moe_router_topk": 2,
            "moe_token_dispatcher_type": "alltoall",
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": SIZES.aux_loss_coeff,
            "moe_layer_freq": [0, 1] + [1] * (num_decoder_layers - 2),
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "bias_activation_fusion": False,
            "add_bias_linear": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "transformer_impl": "local",
            "init_method_std": 0.1,
        }
        | changes
    )
    encoder = copy.copy(decoder)
    encoder.num_layers, encoder.moe_layer_freq = 2, [0, 1]
    config = T5ModelConfig(
        transformer=decoder,
        encoder=encoder,
        vocab_size=VOCABULARY,
        seq_length=LENGTH,
        share_embeddings_and_output_weights=True,
        transformer_layer_spec=t5_layer_specs,
    )
    use_compressed_moe(config, compression or CompressionConfig(), lambda: TrainingStep(0, 1))
    use_sequence_parallel_norms(config)
    return config


def build(config):
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_moe_comp.tasks.t5.model import T5ModelBuilder

    torch.manual_seed(5)
    model_parallel_cuda_manual_seed(1)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return T5ModelBuilder(config).build_model(groups)


def batch_of(rank, samples=3, length=LENGTH):
    """Returns a T5Batch whose lengths and tokens differ from rank to rank."""
    from megatron_moe_comp.tasks.t5.batches import SAMPLE_KEYS, T5Batch, padded_sample

    random = torch.Generator().manual_seed(20 + rank)

    def text(longest):
        length = 1 + int(torch.randint(longest, (1,), generator=random))
        return torch.randint(3, VOCABULARY, (length,), generator=random).numpy()

    longest = (LENGTH - 7, 2, LENGTH // 2, 5)[rank]
    rows = [
        padded_sample(text(longest), text(longest), length, length, 0, 0) for _ in range(samples)
    ]
    return T5Batch.of(
        {key: torch.stack([torch.tensor(r[key]) for r in rows]) for key in SAMPLE_KEYS}
    )


def forward(model, batch):
    return model(
        batch.encoder_tokens,
        batch.decoder_tokens,
        batch.encoder_mask,
        batch.decoder_mask,
        labels=batch.labels,
    )


def global_name(name, rank, per_rank):
    """Returns a parameter's name in the whole model, where experts are numbered across ranks."""
    head, marker, tail = name.partition("local_experts.")
    if not marker:
        return name
    number, _, rest = tail.partition(".")
    return f"{head}{marker}{rank * per_rank + int(number)}.{rest}"


def gathered_weights(model):
    """Returns the weights of the whole model, ready for autograd."""
    rank, size = dist.get_rank(), dist.get_world_size()
    own = {n: p.detach() for n, p in model.named_parameters()}
    parts = [None] * size
    dist.all_gather_object(
        parts, {global_name(n, rank, EXPERTS // size): p for n, p in own.items()}
    )
    return {n: p.clone().requires_grad_() for part in parts for n, p in part.items()}


def equals_the_reference(rank):
    """Trains both with plain gradient descent and compares losses and gradients of every step."""
    size = dist.get_world_size()
    model = build(model_config())
    model.train()
    weights = gathered_weights(model)
    reference = Reference(weights, SIZES)
    batches = [batch_of(r) for r in range(size)]
    for _ in range(STEPS):
        ours = forward(model, batches[rank])
        (ours * batches[rank].decoder_mask).sum().backward()
        total = 0.0
        for r, batch in enumerate(batches):
            losses, aux_loss = reference.losses(batch)
            total = total + (losses * batch.decoder_mask).sum() + aux_loss
            if r == rank:
                close(ours, losses, batch.decoder_mask, "losses")
        total.backward()
        for name, parameter in model.named_parameters():
            grad = parameter.grad
            if ".experts." not in name:
                dist.all_reduce(grad)
            expected = weights[global_name(name, rank, EXPERTS // size)].grad
            close(grad, expected, ..., name)
        for parameter in (*model.parameters(), *weights.values()):
            with torch.no_grad():
                parameter -= LEARNING_RATE * parameter.grad / size
            parameter.grad = None


def close(ours, theirs, where, what):
    ours, theirs = ours[where], theirs[where]
    error = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3)
    assert error < 2e-5, f"{what}: {error}"


def test_none_equals_a_model_by_hand(megatron_pool):
    megatron_pool.run(equals_the_reference)


def ignores_padding(rank):
    """Other tokens in the padding change no loss, no gradient, no router loss."""
    results = []
    for filling in (0, 7):
        batch = batch_of(rank)
        batch.encoder_tokens[~batch.encoder_mask] = filling
        batch.decoder_tokens[~batch.decoder_mask] = filling
        biased = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
        model = build(model_config(**biased))
        model.train()
        (forward(model, batch) * batch.decoder_mask).sum().backward()
        router = model.decoder.layers[1].mlp.router
        tokens = router.local_tokens_per_expert
        assert tokens.sum() == 2 * batch.decoder_mask.sum()
        results.append([tokens, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_padding_reaches_neither_loss_nor_router(megatron_pool):
    megatron_pool.run(ignores_padding)


def losses_and_gradients(rank, **changes):
    model = build(model_config(**changes))
    model.train()
    batch = batch_of(rank)
    losses = forward(model, batch) * batch.decoder_mask
    losses.sum().backward()
    return [losses.detach(), *(p.grad for p in model.parameters())]


def recomputation_changes_nothing(rank):
    plain = losses_and_gradients(rank)
    full = {"recompute_granularity": "full", "recompute_method": "uniform"}
    for changes in (
        full | {"recompute_num_layers": 1},
        {"recompute_granularity": "selective", "recompute_modules": ["moe", "core_attn"]},
    ):
        for a, b in zip(plain, losses_and_gradients(rank, **changes), strict=True):
            assert torch.equal(a, b)


def test_recomputation_changes_nothing(megatron_pool):
    megatron_pool.run(recomputation_changes_nothing)


def numbers_and_router_losses(rank):
    """Returns the MoE layers' numbers, the router losses by layer, and the logged mean."""
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    config = model_config(num_decoder_layers=3)
    model = build(config)
    layers = [m for m in model.modules() if isinstance(m, MoELayer)]
    numbers = [(layer.layer_number, layer.router.layer_number) for layer in layers]
    model.train()
    forward(model, batch_of(rank))
    tracker = get_moe_metrics_tracker()
    losses = tracker.metrics["load_balancing_loss"].values.clone()
    logged = {}
    tracker.report(1.0, 1, num_layers=2, moe_layer_freq=[0, 1], total_loss_dict=logged)
    return numbers, losses, config.layer_names, logged["load_balancing_loss"]


def test_every_layer_of_both_stacks_has_its_place(megatron_pool):
    results = megatron_pool.run(numbers_and_router_losses)
    for numbers, losses, names, logged in results:
        assert numbers == [(2, 2), (4, 4), (5, 5)]
        assert losses.count_nonzero() == 3
        assert losses[[1, 3, 4]].all()
        assert names[1::2] == ["encoder layer 2", "decoder layer 2"]
        mean = sum(r[1].sum() for r in results) / len(results) / 3
        assert abs(logged - mean) < 1e-5


def both_stacks_are_compressed(rank, options):
    """Returns the counters of an MoE layer of the encoder, and of one of the decoder."""
    model = build(model_config(CompressionConfig(moe_a2a_seed=1, **options)))
    model.train()
    batch = batch_of(rank, samples=8)
    (forward(model, batch) * batch.decoder_mask).sum().backward()
    return [block.layers[1].mlp.stats.totals() for block in (model.encoder, model.decoder)]


@pytest.mark.parametrize(
    "options",
    [{"moe_a2a_compress": "birdmoe"}, {"moe_a2a_compress": "lsh", "moe_lsh_num_hashes": 1}],
    ids=["birdmoe", "lsh"],
)
def test_both_stacks_are_compressed(megatron_pool, options):
    for of_ranks in zip(*megatron_pool.run(both_stacks_are_compressed, options), strict=True):
        totals = sum(of_ranks)
        assert (totals[:, Column.RAW] > 0).all()
        assert (totals[:, Column.WIRE] < totals[:, Column.RAW]).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"moe_a2a_compress": "identity"},
        {"moe_a2a_compress": "identity", "moe_a2a_dedup": True},
        {"moe_a2a_compress": "lsh", "moe_lsh_target_rate": 1.0, "moe_lsh_num_hashes": 64},
    ],
    ids=["none", "identity", "dedup", "lsh"],
)
def test_padding_is_not_sent(megatron_pool, options):
    megatron_pool.run(padding_is_not_sent, options)


def padding_is_not_sent(rank, options):
    """Longer padding changes losses by float order alone, and sends not a row more."""
    results = []
    for extra in (0, 7):
        model = build(model_config(CompressionConfig(**options)))
        model.train()
        batch = batch_of(rank, length=LENGTH - 7 + extra)
        losses = forward(model, batch)[batch.decoder_mask]
        losses.sum().backward()
        layers = [block.layers[1].mlp.stats for block in (model.encoder, model.decoder)]
        rows = [stats.totals()[:, (Column.PAIRS, Column.ROWS)] for stats in layers]
        results.append((losses, [p.grad for p in model.parameters()], torch.stack(rows)))
    (losses, grads, rows), (longer_losses, longer_grads, longer_rows) = results
    close(losses, longer_losses, ..., "losses")
    for a, b in zip(grads, longer_grads, strict=True):
        if a is not None:
            close(a, b, ..., "gradient")
    assert rows.any()
    assert torch.equal(rows, longer_rows)
