"""Fine-tunes or pre-trains a T5 Mixture-of-Experts model with a compressed expert all-to-all.

Megatron's training of an encoder-decoder on pairs of texts, evaluated by its loss and by its
answers, or by span corruption. The flags are Megatron's, those of CompressionConfig and those of
T5Options. Start it with torchrun.
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
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.t5_dataset import (
    T5MaskedWordPieceDataset,
    T5MaskedWordPieceDatasetConfig,
)
from megatron.core.datasets.utils import Split
from megatron.core.tensor_parallel import broadcast_data
from megatron.training import get_args, get_timers, print_rank_0, set_startup_timestamps
from megatron.training.utils import get_blend_and_blend_per_split, is_rank0

from megatron_moe_comp.data.pairs.reader import Pairs, read_pairs
from megatron_moe_comp.data.t5_tokenizer import T5Tokenizer
from megatron_moe_comp.options.checks import flag
from megatron_moe_comp.options.t5_options import T5Options
from megatron_moe_comp.tasks.t5.batches import SAMPLE_KEYS, PairsDataset, T5Batch, trimmed
from megatron_moe_comp.tasks.t5.evaluation import AnswerEvaluation
from megatron_moe_comp.tasks.t5.model import T5MoEModel, t5_config_from_args
from megatron_moe_comp.training import arguments, checkpoint_start, run

SPLITS = {Split.train: "train", Split.valid: "valid", Split.test: "test"}
MAX_NGRAM = 10
"""Longest corrupted span, as in Megatron's own T5 pre-training."""


def main() -> None:
    """Parses the flags, builds the configuration and trains."""
    set_startup_timestamps(program_start=PROGRAM_START, main_entry=time.time())
    args, compression = run.parse_args(arguments.add_t5_args)
    options = arguments.t5_options_from_args(args)
    checkpoint_start.check_t5_options_of_checkpoint(options)
    tokenizer = tokenizer_of(args)
    model_config = t5_config_from_args(args, options)
    answers = None
    if options.task == "seq2seq":
        pairs = read_splits(args, options, tokenizer)
        datasets_provider = partial(pairs_datasets, pairs, tokenizer)
        if options.decode_samples:
            answers = AnswerEvaluation(
                tokenizer,
                pairs,
                num_samples=options.decode_samples,
                batch_size=args.eval_micro_batch_size,
                max_input_tokens=args.encoder_seq_length,
                max_tokens=args.decoder_seq_length,
                predictions=options.predictions_jsonl,
                iteration=arguments.finished_iterations,
            )
    else:
        datasets_provider = partial(span_corruption_datasets, tokenizer)
    run.train(
        args,
        compression,
        model_config,
        model_config.layer_names,
        datasets_provider,
        partial(forward_step, answers),
        non_loss_data_func=answers,
    )


def tokenizer_of(args: Namespace) -> T5Tokenizer:
    """Returns the tokenizer; raises ValueError for one that does not fit T5 or the model."""
    if args.tokenizer_type != "SentencePieceTokenizer" or args.tokenizer_model is None:
        raise ValueError(
            f"--tokenizer-type={args.tokenizer_type}: T5 needs a SentencePiece model. Use "
            "--tokenizer-type SentencePieceTokenizer --tokenizer-model FILE."
        )
    if args.decoder_seq_length is None:
        raise ValueError(
            "--decoder-seq-length: needed, the most tokens of a target; --encoder-seq-length or "
            "--seq-length is that of an input."
        )
    for name in ("encoder_seq_length", "decoder_seq_length"):
        length, ranks = getattr(args, name), args.tensor_model_parallel_size
        if args.sequence_parallel and length % ranks:
            raise ValueError(
                f"{flag(name)}={length}: --sequence-parallel divides positions among "
                f"the {ranks} tensor parallel ranks. Use a multiple of {ranks}."
            )
    tokenizer = T5Tokenizer(args.tokenizer_model)
    if args.padded_vocab_size is not None and args.padded_vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"--padded-vocab-size={args.padded_vocab_size}: the tokenizer has "
            f"{tokenizer.vocab_size} pieces. Use that or more, or drop the option."
        )
    return tokenizer


def read_splits(args: Namespace, options: T5Options, tokenizer: T5Tokenizer) -> dict[Split, Pairs]:
    """Returns the pairs of every split that has a file; raises ValueError for unusable files."""
    if args.data_path is not None or args.data_args_path or args.per_split_data_args_path:
        raise ValueError(
            "--data-path and its like name Megatron's token files, which --task=seq2seq does not "
            "read. Name JSONL files with --train-data-path, --valid-data-path, --test-data-path."
        )
    pairs = {}
    for split, name in SPLITS.items():
        paths = getattr(args, f"{name}_data_path")
        if paths is None:
            if split == Split.test or (split == Split.valid and args.eval_iters == 0):
                continue
            raise ValueError(f"--{name}-data-path: not given. Name a JSONL file of pairs.")
        if len(paths) != 1:
            raise ValueError(
                f"--{name}-data-path={' '.join(paths)}: one JSONL file is read. Put the pairs of "
                "all files into one."
            )
        pairs[split] = read_pairs(
            paths[0],
            tokenizer,
            args.encoder_seq_length,
            args.decoder_seq_length,
            options.bad_lines,
            options.long_lines,
        )
        if is_rank0():
            print("\n".join([f"{paths[0]}: {len(pairs[split])} pairs", *pairs[split].remarks]))
    return pairs


def pairs_datasets(
    pairs: dict[Split, Pairs], tokenizer: T5Tokenizer, num_samples: tuple[int, int, int]
) -> list[PairsDataset | None]:
    """Returns the datasets of training, validation and test."""
    args = get_args()
    if mpu.get_tensor_model_parallel_rank() != 0:
        return [None] * len(SPLITS)
    return [
        PairsDataset(
            pairs[split],
            split=split,
            num_samples=number,
            encoder_length=args.encoder_seq_length,
            decoder_length=args.decoder_seq_length,
            start_id=tokenizer.start_id,
            pad_id=tokenizer.pad_id,
            seed=args.seed,
        )
        if split in pairs
        else None
        for split, number in zip(SPLITS, num_samples, strict=True)
    ]


def span_corruption_datasets(
    tokenizer: T5Tokenizer, num_samples: tuple[int, int, int]
) -> tuple[Any, Any, Any]:
    """Returns Megatron's T5 datasets of training, validation and test."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = T5MaskedWordPieceDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.encoder_seq_length,
        sequence_length_decoder=args.decoder_seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=tokenizer,
        masking_probability=args.mask_prob,
        short_sequence_probability=args.short_seq_prob,
        masking_max_ngram=MAX_NGRAM,
        masking_do_full_word=True,
        masking_do_permutation=False,
        masking_use_longer_ngrams=False,
        masking_use_geometric_distribution=True,
    )
    print_rank_0("> building train, validation, and test datasets for T5 ...")
    return BlendedMegatronDatasetBuilder(
        T5MaskedWordPieceDataset,
        num_samples,
        lambda: mpu.get_tensor_model_parallel_rank() == 0,
        config,
    ).build()


def get_batch(data_iterator: Iterator[dict[str, torch.Tensor]]) -> tuple[T5Batch, torch.Tensor]:
    """Returns the next micro-batch, and the number of the split it is of."""
    parallel = mpu.get_tensor_model_parallel_world_size()
    batch = None
    if mpu.get_tensor_model_parallel_rank() == 0:
        sample = next(data_iterator)
        split = sample.get("split", torch.tensor([Split.train.value]))[:1]
        batch = trimmed(sample, parallel) | {"split": split}
    batch = broadcast_data([*SAMPLE_KEYS, "split"], batch, torch.int64)
    return T5Batch.of(batch), batch["split"]


def forward_step(
    answers: AnswerEvaluation | None,
    data_iterator: Iterator[dict[str, torch.Tensor]],
    model: T5MoEModel,
) -> tuple[torch.Tensor, Callable[[torch.Tensor], run.Loss]]:
    """Returns the model's output for the next micro-batch and the function of its loss."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch, split = get_batch(data_iterator)
    timers("batch-generator").stop()
    if answers is not None and not model.training:
        answers.split = Split(split.item())
    output = model(
        batch.encoder_tokens,
        batch.decoder_tokens,
        batch.encoder_mask,
        batch.decoder_mask,
        labels=batch.labels,
    )
    return output, partial(run.loss_function, get_args(), batch.decoder_mask)


if __name__ == "__main__":
    main()
