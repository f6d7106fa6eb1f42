"""Writes a T5's weights as a Megatron checkpoint, from one process on the CPU."""

import io
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.checkpointing import save_checkpoint

from megatron_moe_comp.tasks.t5.model import T5ModelBuilder, t5_config_from_args
from megatron_moe_comp.training import arguments, run

# Megatron wants sizes, and nothing of the model depends on them: its positions are relative.
FLAGS = """
    --micro-batch-size 1 --seq-length 512 --max-position-embeddings 512 --no-initialization
    --ckpt-format torch_dist --save-interval 1 --no-save-optim --no-save-rng
"""


def save_t5(flags: Sequence[str], weights: dict[str, torch.Tensor], output: Path) -> int:
    """Writes the checkpoint that the flags and weights describe; returns how many weights it has.

    It is a release checkpoint: training starts at iteration 0, with a new optimizer. It replaces
    this process's command line and starts Megatron in it, so it can be called once.

    Args:
        flags: of Megatron and finetune_t5_moe.py, for the model.
        weights: float32, by parameter name.
        output: directory of the checkpoint.
    """
    # Megatron would take the first GPU; the host has room for larger models.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.argv[1:] = [*flags, *FLAGS.split(), "--save", str(output)]
    with redirect_stdout(io.StringIO()):  # of Megatron's list of several hundred arguments
        args, _ = run.parse_args(arguments.add_t5_args)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
    config = t5_config_from_args(args, arguments.t5_options_from_args(args))
    builder = T5ModelBuilder(config)
    model = builder.build_model(ProcessGroupCollection.use_mpu_process_groups())
    _fill(model, weights)
    save_checkpoint(0, [model], None, None, 0, release=True)
    torch.distributed.destroy_process_group()
    return sum(parameter.numel() for parameter in model.parameters())


def _fill(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    assert parameters.keys() == weights.keys(), parameters.keys() ^ weights.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            assert parameter.shape == weights[name].shape, name
            parameter.copy_(weights[name])
