"""Greedy decoding with an encoder-decoder model whose ranks must take every step together.

B: batch, S: encoder positions, T: decoder positions.
"""

from collections.abc import Callable

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from megatron_moe_comp.comm.all_to_all import sum_over_ranks
from megatron_moe_comp.data.t5_tokenizer import T5Tokenizer
from megatron_moe_comp.tasks.t5.batches import rounded_length


@torch.no_grad()
def greedy_decode(
    model: Callable[..., torch.Tensor],
    encoder_tokens: torch.Tensor,
    encoder_mask: torch.Tensor,
    tokenizer: T5Tokenizer,
    max_tokens: int,
    tensor_parallel_size: int = 1,
) -> torch.Tensor:
    """Returns the most likely next token again and again: int64 [B, up to max_tokens].

    After the end of a sequence comes padding. The encoder runs once; each step runs the decoder
    over all tokens so far. Every rank of the run must call it, since the experts of each serve all;
    it ends when all ranks' sequences have ended.

    Args:
        model: T5MoEModel, or one wrapped around it.
        encoder_tokens: int64 [B, S]; S a multiple of the tensor parallel size.
        encoder_mask: bool [B, S], False for padding.
        tokenizer: whose ids the model was trained with; padding of the vocabulary is never chosen.
        max_tokens: most tokens of an answer, the end of sequence included; a multiple of the tensor
            parallel size where positions are shared, too.
        tensor_parallel_size: ranks that share the vocabulary.
    """

    def run(
        decoder_tokens: torch.Tensor, length: int, **kwargs: torch.Tensor | bool
    ) -> torch.Tensor:
        decoder_mask = (torch.arange(decoder_tokens.shape[1]) < length).to(encoder_mask.device)
        decoder_mask = decoder_mask.expand_as(decoder_tokens)
        return model(encoder_tokens, decoder_tokens, encoder_mask, decoder_mask, **kwargs)

    batch = len(encoder_tokens)
    tokens = encoder_tokens.new_full((batch, max_tokens + 1), tokenizer.pad_id)
    tokens[:, 0] = tokenizer.start_id
    hidden = run(tokens[:, :tensor_parallel_size], 1, output_encoder_hidden_only=True)
    # A rank without an input of its own keeps no other waiting.
    finished = (encoder_tokens == tokenizer.pad_id).all(dim=1)
    for position in range(max_tokens):
        length = rounded_length(position + 1, tensor_parallel_size, limit=max_tokens)
        logits = run(tokens[:, :length], position + 1, encoder_hidden_states=hidden)
        last = gather_from_tensor_model_parallel_region(logits[:, position])
        best = last[:, : tokenizer.vocab_size].argmax(dim=1)
        tokens[:, position + 1] = best.masked_fill(finished, tokenizer.pad_id)
        finished |= best == tokenizer.eos_id
        if not sum_over_ranks((~finished).sum().double()):
            break
    return tokens[:, 1 : position + 2]
