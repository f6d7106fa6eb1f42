"""Samples and micro-batches of T5: (input, target) pairs as Megatron's T5 datasets lay them out.

B: micro-batch, S: encoder positions, T: decoder positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.datasets.utils import Split

SAMPLE_KEYS = ("text_enc", "text_dec", "labels", "loss_mask", "enc_mask")
"""What a batch holds, in Megatron's names; a sample may hold more."""

LENGTH_MULTIPLE = 16
"""Padded lengths are multiples of this: tensor cores like it, and lengths repeat."""

Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class T5Batch:
    """A micro-batch on this rank's device."""

    encoder_tokens: torch.Tensor
    """int64 [B, S]."""
    decoder_tokens: torch.Tensor
    """int64 [B, T]: the target shifted right."""
    labels: torch.Tensor
    """int64 [B, T]."""
    encoder_mask: torch.Tensor
    """bool [B, S], False for padding."""
    decoder_mask: torch.Tensor
    """bool [B, T], False for padding; where the loss counts."""

    @classmethod
    def of(cls, batch: dict[str, torch.Tensor]) -> "T5Batch":
        """Returns the batch that SAMPLE_KEYS name."""
        text_enc, text_dec, labels, loss_mask, enc_mask = (batch[key] for key in SAMPLE_KEYS)
        return cls(text_enc, text_dec, labels, enc_mask.bool(), loss_mask.bool())


class PairsDataset(torch.utils.data.Dataset):
    """Pairs as samples of equal length, in an order that is shuffled for each pass over them.

    Args:
        pairs: token ids of inputs and targets, each ending with the end-of-sequence id.
        split: training pairs are shuffled, others keep their order.
        num_samples: how many samples training or evaluation takes; None for one pass.
        encoder_length: positions of an input.
        decoder_length: positions of a target.
        start_id: what a decoder starts with.
        pad_id: fills what is left.
        seed: of the order.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        split: Split,
        num_samples: int | None,
        encoder_length: int,
        decoder_length: int,
        start_id: int,
        pad_id: int,
        seed: int,
    ) -> None:
        self._pairs = pairs
        self.split = split
        self._length = len(pairs) if num_samples is None else max(num_samples, len(pairs))
        self._lengths = (encoder_length, decoder_length)
        self._start_id, self._pad_id = start_id, pad_id
        self._seed = seed
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns a sample, SAMPLE_KEYS and which split it is of."""
        passes, position = divmod(index, len(self._pairs))
        if self.split == Split.train:
            position = self._shuffled(passes)[position]
        sample = padded_sample(*self._pairs[position], *self._lengths, self._start_id, self._pad_id)
        return sample | {"split": np.int64(self.split.value)}

    def _shuffled(self, passes: int) -> np.ndarray:
        if self._order is None or self._order[0] != passes:
            random = np.random.default_rng([self._seed, passes])
            self._order = passes, random.permutation(len(self._pairs))
        return self._order[1]


def padded_sample(
    source: np.ndarray,
    target: np.ndarray,
    encoder_length: int,
    decoder_length: int,
    start_id: int,
    pad_id: int,
) -> dict[str, np.ndarray]:
    """Returns a pair as int64 arrays under SAMPLE_KEYS, for teacher forcing."""
    text_enc = np.full(encoder_length, pad_id, dtype=np.int64)
    text_dec, labels = (np.full(decoder_length, pad_id, dtype=np.int64) for _ in range(2))
    text_enc[: len(source)] = source
    text_dec[0] = start_id
    text_dec[1 : len(target)] = target[:-1]
    labels[: len(target)] = target
    return {
        "text_enc": text_enc,
        "text_dec": text_dec,
        "labels": labels,
        "loss_mask": (np.arange(decoder_length) < len(target)).astype(np.int64),
        "enc_mask": (np.arange(encoder_length) < len(source)).astype(np.int64),
    }


def rounded_length(longest: int, tensor_parallel_size: int, limit: int) -> int:
    """Returns the length that a batch is padded to; a part for each tensor parallel rank.

    Args:
        longest: tokens of the batch's longest sequence.
        tensor_parallel_size: ranks that share the positions.
        limit: most positions, as many as the model may have.
    """
    multiple = int(np.lcm(LENGTH_MULTIPLE, tensor_parallel_size))
    return min(-(-longest // multiple) * multiple, limit)


def trimmed(batch: dict[str, torch.Tensor], tensor_parallel_size: int) -> dict[str, torch.Tensor]:
    """Returns the batch without most of the positions that are padding in all of its samples.

    Attention and dense layers compute padding like any token; only experts are spared it.
    """
    ends = {}
    for masked, names in (("enc_mask", ("text_enc",)), ("loss_mask", ("text_dec", "labels"))):
        longest = int(batch[masked].sum(dim=1).max())
        end = rounded_length(max(longest, 1), tensor_parallel_size, limit=batch[masked].shape[1])
        ends |= dict.fromkeys((masked, *names), end)
    return {key: batch[key][:, : ends[key]].long() for key in SAMPLE_KEYS}
