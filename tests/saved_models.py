"""Tiny models in parallel layouts, and checkpoints of them, within the processes of a GlooPool."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import Queue

import torch

from tests.end_to_end.tiny_training import initialize
from tests.gloo import GlooPool

LAYOUTS = {
    "one": (1, {}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "ep4": (4, {"expert_model_parallel_size": 4}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "tp2": (2, {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}),
    "tp2 etp2": (2, {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}),
    "tp2 etp2 ep2": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "expert_tensor_parallel_size": 2,
            "expert_model_parallel_size": 2,
        },
    ),
}
SWIGLU = {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
UNTIED = {"share_embeddings_and_output_weights": False}
DENSE = {"num_moe_experts": None, "sequence_parallel": False}
ALTERNATE = {"moe_layer_freq": [0, 1]}
T5 = {"relative_attention_num_buckets": 8}
"""Any option of T5 alone makes a T5."""
ITERATION, LENGTH, VOCABULARY = 3, 8, 64


def start_pool(layout):
    ranks, groups = LAYOUTS[layout]
    return GlooPool(ranks, partial(initialize, groups=groups))


def make_config(layout, changes):
    """Returns a GPTModelConfig or T5ModelConfig that builds compressed MoE layers."""
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.models.gpt import GPTModelConfig

    from megatron_moe_comp.mcore.layer_specs import (
        use_compressed_moe,
        use_sequence_parallel_norms,
    )
    from megatron_moe_comp.options.config import CompressionConfig
    from megatron_moe_comp.tasks.t5.model import T5ModelConfig, t5_layer_specs

    groups = LAYOUTS[layout][1]
    options = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_token_dispatcher_type": "alltoall",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "transformer_impl": "local",
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "pipeline_dtype": torch.float32,
        "sequence_parallel": "tensor_model_parallel_size" in groups,
        **groups,
    }
    of_model = {
        "vocab_size": VOCABULARY,
        "seq_length": LENGTH,
        "share_embeddings_and_output_weights": True,
        "parallel_output": False,
        "position_embedding_type": "learned_absolute",
    }
    for name, value in changes.items():
        (of_model if name in {**of_model, **T5} else options)[name] = value
    transformer = TransformerConfig(**options)
    if changes.keys() & T5:
        stacks = {"encoder": TransformerConfig(**options), "transformer": transformer}
        config = T5ModelConfig(transformer_layer_spec=t5_layer_specs, **stacks, **of_model)
    else:
        config = GPTModelConfig(transformer=transformer, **of_model)
    use_compressed_moe(config, CompressionConfig(moe_a2a_compress="none"), lambda: None)
    use_sequence_parallel_norms(config)
    return config


def build(config, seed=1):
    """Returns this rank's model, wrapped as for training, with random weights."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return config.get_builder_cls()(config).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(), DistributedDataParallelConfig()
    )


def metadata():
    from megatron.core import mpu

    return {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
    }


def save(directory, model, kind):
    """Writes a checkpoint of a model, and of an optimizer, as Megatron does.

    Args:
        directory: of the checkpoint.
        model: unwrapped.
        kind: "torch", "torch_dist", or "release", which is torch_dist without iteration.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training.checkpointing import get_checkpoint_name

    is_release = kind == "release"
    tracker = Path(directory) / "latest_checkpointed_iteration.txt"
    tracker.write_text("release" if is_release else str(ITERATION))
    if kind == "torch":
        path = Path(get_checkpoint_name(directory, ITERATION))
        path.parent.mkdir(parents=True)
        torch.save({"model": model.state_dict(), "iteration": ITERATION}, path)
        return
    # In the place of one in a further process, which those of a pool may not start.
    filesystem_async._results_queue = Queue()
    path = Path(get_checkpoint_name(directory, ITERATION, is_release, return_base_dir=True))
    path.mkdir(parents=True, exist_ok=True)
    content = {"model": model.sharded_state_dict(metadata=metadata()), "iteration": ITERATION}
    for name, tensor in list(content["model"].items()):
        if name.endswith("final_layernorm.weight"):
            content["optimizer"] = replace(tensor, key=f"optimizer.state.exp_avg.{tensor.key}")
    saved = {key: value for key, value in metadata().items() if key != "dp_cp_group"}
    dist_checkpointing.save(content, str(path), content_metadata=saved)
