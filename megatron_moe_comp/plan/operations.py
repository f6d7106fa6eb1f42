"""How much there is to compute: tokens, operations and weights of a rank."""

from megatron_moe_comp.plan.shape import Layout, Model, Stack


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


def weights_per_rank(model: Model, layout: Layout) -> tuple[float, float]:
    """Returns the dense and the expert weights that a rank holds."""
    dense = sum(_dense_weights(model, stack) for stack in model.stacks)
    dense += model.vocab_size * model.hidden_size
    expert = model.num_experts * _ffn_weights(model, model.moe_ffn_hidden_size)
    expert *= sum(stack.num_moe_layers for stack in model.stacks)
    shards = layout.expert_parallel * layout.expert_tensor_parallel
    stages = layout.pipeline_parallel
    return dense / layout.tensor_parallel / stages, expert / shards / stages
