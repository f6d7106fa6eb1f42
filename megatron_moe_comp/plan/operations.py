"""How much there is to compute: tokens, operations and weights of a rank."""

from megatron_moe_comp.plan.shape import Layout, Model, Stack

LOGIT_BYTES = 4


def tokens_per_rank(model: Model, layout: Layout, stack: Stack) -> float:
    """Returns the tokens of a micro-batch that one rank dispatches."""
    return model.micro_batch_size * stack.seq_length / layout.sequence_shards


def _ffn_weights(model: Model, size: int) -> int:
    return (3 if model.gated else 2) * model.hidden_size * size


def _attention_weights(model: Model) -> int:
    queries = model.attention_size or model.hidden_size
    return 2 * model.hidden_size * (queries + (model.kv_size or queries))


def _dense_weights(model: Model, stack: Stack) -> int:
    """Returns the weights that every token of a stack goes through, embeddings aside."""
    dense_layers = stack.num_layers - stack.num_moe_layers
    of_moe = model.hidden_size * model.num_experts + _ffn_weights(model, model.shared_expert_size)
    return (
        stack.num_layers * stack.attentions * _attention_weights(model)
        + dense_layers * _ffn_weights(model, model.ffn_hidden_size)
        + stack.num_moe_layers * of_moe
    )


def dense_flops(model: Model, layout: Layout) -> float:
    """Returns a rank's operations of a micro-batch outside the experts, if it had all layers."""
    passes = 4 if model.recompute == "full" else 3
    total = 0.0
    for stack in model.stacks:
        scores = 2 * stack.seq_length * (model.attention_size or model.hidden_size)
        per_token = _dense_weights(model, stack) + stack.num_layers * stack.attentions * scores
        total += tokens_per_rank(model, layout, stack) * 2 * passes * per_token
    head = model.vocab_size * model.hidden_size
    return total + tokens_per_rank(model, layout, model.stacks[-1]) * 6 * head


def expert_flops(model: Model, layout: Layout) -> float:
    """Returns the operations of a micro-batch of the most loaded rank's experts, likewise."""
    passes = 3 if model.recompute == "none" else 4
    per_row = 2 * passes * _ffn_weights(model, model.moe_ffn_hidden_size)
    return sum(
        stack.num_moe_layers
        * tokens_per_rank(model, layout, stack)
        * (model.topk * layout.load * per_row)
        for stack in model.stacks
    )


def weights(model: Model) -> tuple[int, int]:
    """Returns the dense and the expert weights of the whole model, without norms and biases."""
    dense = sum(_dense_weights(model, stack) for stack in model.stacks)
    dense += (1 if model.tied_embeddings else 2) * model.vocab_size * model.hidden_size
    expert = model.num_experts * _ffn_weights(model, model.moe_ffn_hidden_size)
    return dense, expert * sum(stack.num_moe_layers for stack in model.stacks)


def weights_per_rank(model: Model, layout: Layout) -> tuple[float, float]:
    """Returns the dense and the expert weights that a rank holds, of stages that hold the same."""
    dense, expert = weights(model)
    shards = layout.expert_parallel * layout.expert_tensor_parallel
    stages = layout.pipeline_parallel
    return dense / layout.tensor_parallel / stages, expert / shards / stages


def activation_bytes(model: Model, layout: Layout) -> float:
    """Returns about what a rank keeps for the backward pass of the micro-batches under way.

    Inputs of matrix products, norms and activation functions, after Korthikanti et al. (2022), who
    keep the scores of attention, too; fused attention does not. Of the logits, float32.
    """
    hidden = model.hidden_size
    queries = model.attention_size or hidden
    attention = 2 * hidden + 2 * queries + 2 * (model.kv_size or queries)
    inner = 3 if model.gated else 2
    dense = 2 * hidden + inner * model.ffn_hidden_size
    shared = inner * model.shared_expert_size
    # A routed row is permuted, sent and multiplied by its probability.
    routed = 3 * hidden + inner * model.moe_ffn_hidden_size
    moe = 2 * hidden + shared + (model.topk * routed if model.recompute == "none" else 0)
    values = 0.0
    for stack in model.stacks:
        per_token = (
            stack.num_layers * stack.attentions * attention
            + (stack.num_layers - stack.num_moe_layers) * dense
            + stack.num_moe_layers * moe
        )
        if model.recompute == "full":
            per_token = stack.num_layers * hidden
        values += tokens_per_rank(model, layout, stack) * per_token
    stages = layout.pipeline_parallel
    under_way = min(stages, model.num_microbatches)
    logits = tokens_per_rank(model, layout, model.stacks[-1]) * model.vocab_size
    return values * model.value_bytes * under_way / stages + LOGIT_BYTES * logits
