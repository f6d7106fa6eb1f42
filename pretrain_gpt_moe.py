"""Pretrains a GPT Mixture-of-Experts model with a compressed expert all-to-all.

Megatron's GPT pretraining with two additions: the flags of CompressionConfig, and a layer spec
whose MoE layers compress their all-to-alls. Start it with torchrun; every Megatron flag works.
"""

# ruff: noqa: E402 (Megatron reports how long the imports took)
import time

PROGRAM_START = time.time()

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import (
    BlendedMegatronDatasetBuilder,
)
from megatron.core.datasets.gpt_dataset import (
    GPTDataset,
    GPTDatasetConfig,
    MockGPTDataset,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import (
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import (
    get_args,
    get_timers,
    get_tokenizer,
    print_rank_0,
    set_startup_timestamps,
)
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.utils import (
    get_blend_and_blend_per_split,
    is_first_or_last_pipeline_stage,
)

from megatron_moe_comp.options.checks import flag
from megatron_moe_comp.training import run

BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")

Batch = dict[str, torch.Tensor | None]


def main() -> None:
    """Parses the flags, builds the configuration and trains."""
    set_startup_timestamps(program_start=PROGRAM_START, main_entry=time.time())
    args, compression = run.parse_args()
    check_data_options(args)
    model_config = gpt_config_from_args(args)
    num_layers = model_config.transformer.num_layers
    run.train(
        args,
        compression,
        model_config,
        [f"layer {number + 1}" for number in range(num_layers)],
        datasets_provider,
        forward_step,
    )


def check_data_options(args: Namespace) -> None:
    """Raises ValueError for data formats that this script does not read."""
    for option in (
        "sft",
        "fim_data",
        "hybrid_context_parallel",
        "dataloader_inter_document_masking",
    ):
        if getattr(args, option, False):
            raise ValueError(
                f"{flag(option)}: this script pretrains on plain GPT samples. Drop the option."
            )


def datasets_provider(
    train_val_test_num_samples: tuple[int, int, int], vp_stage: int | None = None
) -> tuple[Any, Any, Any]:
    """Returns the training, validation and test datasets."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
    )
    print_rank_0("> building train, validation, and test datasets ...")
    return BlendedMegatronDatasetBuilder(
        MockGPTDataset if args.mock_data else GPTDataset,
        train_val_test_num_samples,
        partial(reads_data, vp_stage=vp_stage),
        config,
    ).build()


def reads_data(vp_stage: int | None = None) -> bool:
    """Returns whether this rank reads samples itself (tensor parallel peers are sent theirs)."""
    return is_first_or_last_pipeline_stage(vp_stage) and mpu.get_tensor_model_parallel_rank() == 0


def get_batch(data_iterator: Iterator[Batch], vp_stage: int | None) -> Batch:
    """Returns this rank's part of the next micro-batch; None for what its stage does not need."""
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(BATCH_KEYS)
    args = get_args()
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: Batch = {}
    if tp_rank == 0:
        sample = next(data_iterator)
        batch = {key: sample[key].cuda(non_blocking=True) for key in BATCH_KEYS if key in sample}
    batch = get_batch_on_this_tp_rank(
        dict.fromkeys((*BATCH_KEYS, "cu_seqlens", "max_seqlen", "local_cp_size")) | batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=args.mtp_num_layers is not None,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    return get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )


def forward_step(
    data_iterator: Iterator[Batch], model: GPTModel
) -> tuple[torch.Tensor, Callable[[torch.Tensor], run.Loss]]:
    """Returns the model's output for the next micro-batch and the function of its loss."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(run.loss_function, get_args(), batch["loss_mask"])


if __name__ == "__main__":
    main()
