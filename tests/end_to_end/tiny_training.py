"""Trains a tiny GPT-MoE for a few steps in the processes of a GlooPool.

Megatron builds, wraps, schedules and optimizes the model; arguments, data and loss are ours. That
takes seconds where torchrun and an entry script take half a minute.
"""

import hashlib
import io
import logging
import sys
from dataclasses import dataclass

import torch

STEPS, MICROBATCHES, MICROBATCH, LENGTH, VOCABULARY = 3, 4, 2, 8, 64
LEARNING_RATE, SEED = 1e-2, 7

RECOMPUTE = {
    "": {},
    "recompute-moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "recompute-full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


@dataclass(frozen=True)
class Outcome:
    """What one rank saw."""

    losses: tuple[tuple[float, ...], ...]
    """Step -> micro-batch; the inner ones empty on ranks without the last stage."""
    gradient_norms: tuple[float, ...]
    parameters: str
    """Digest of the model's parameters and of the optimizer's copies in full precision."""
    replicated: str
    """Digest of those that all ranks of a pipeline stage hold alike."""


def initialize(rank, groups):
    from megatron.core import parallel_state

    from megatron_moe_comp.cpu_host import patches

    logging.disable(logging.WARNING)
    sys.stdout = io.StringIO()
    patches.enable()
    parallel_state.initialize_model_parallel(**groups)


def train(rank, layout, options):
    """Returns the Outcome of a few steps on one batch; with Megatron's dropout of 0.1."""
    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.parallel_state import get_data_parallel_rank
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

    from megatron_moe_comp.compression.random_stream import TrainingStep
    from megatron_moe_comp.mcore.layer_specs import (
        use_compressed_moe,
        use_sequence_parallel_norms,
    )
    from megatron_moe_comp.options.config import CompressionConfig
    from megatron_moe_comp.training.clustering_adaptation import LshAdaptation

    losses, norms = [], []
    config = transformer_config(layout)
    config.finalize_model_grads_func = finalize_model_grads
    model_config = GPTModelConfig(transformer=config, vocab_size=VOCABULARY, seq_length=LENGTH)
    compression = CompressionConfig(**options)

    def step():
        return TrainingStep(len(norms), MICROBATCHES)

    use_compressed_moe(model_config, compression, step)
    use_sequence_parallel_norms(model_config)
    LshAdaptation(compression, step, lambda: None, lambda _: None).attach(
        model_config, model_config.transformer.num_layers
    )
    model_parallel_cuda_manual_seed(SEED)
    sharded = {"use_distributed_optimizer": bool(layout.optimizer)}
    model = GPTModelBuilder(model_config).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, **sharded),
    )
    precision = {"bf16": config.bf16, "params_dtype": config.params_dtype}
    optimizer = get_megatron_optimizer(
        OptimizerConfig(lr=LEARNING_RATE, **precision, **sharded), model
    )
    config.grad_scale_func = optimizer.scale_loss
    random = torch.Generator().manual_seed(get_data_parallel_rank())
    shape = (MICROBATCHES, MICROBATCH, LENGTH + 1)
    samples = torch.randint(VOCABULARY, shape, generator=random)
    for _ in range(STEPS):
        model[0].zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter(samples),
            model=model,
            num_microbatches=MICROBATCHES,
            seq_length=LENGTH,
            micro_batch_size=MICROBATCH,
        )
        losses.append(tuple(report["lm loss"] for report in reports))
        norms.append(float(optimizer.step()[1]))
    parameters = list(model[0].parameters())
    return Outcome(
        tuple(losses),
        tuple(norms),
        parameters=_digest(parameters + optimizer.get_parameters()),
        replicated=_digest(filter(_is_replicated, parameters)),
    )


def _is_replicated(parameter):
    is_of_expert = not getattr(parameter, "allreduce", True)
    return not (is_of_expert or parameter.tensor_model_parallel)


def _digest(tensors):
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def transformer_config(layout):
    from megatron.core.transformer.transformer_config import TransformerConfig

    dtype = torch.bfloat16 if layout.precision else torch.float32
    return TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        add_bias_linear=False,
        num_moe_experts=4,
        moe_ffn_hidden_size=32,
        moe_router_topk=2,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=1e-2,
        transformer_impl="local",
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bf16=bool(layout.precision),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        sequence_parallel=bool(layout.tensor),
        **RECOMPUTE[layout.recompute],
        **layout.groups(),
    )


def _forward_step(samples, model):
    sample = next(samples)
    positions = torch.arange(LENGTH).expand(MICROBATCH, LENGTH)
    return model(sample[:, :-1], positions, None, labels=sample[:, 1:]), _loss


def _loss(output):
    mean = output.float().mean()
    return mean, {"lm loss": mean.item()}
