"""T5-MoE by hand in plain PyTorch on one process, over weights by Megatron's names.

RMSNorm, learned positions, gated SiLU, no biases but the tied head's, experts by top-k of a softmax
over the chosen. B: batch, S and T: positions of encoder and decoder, H: hidden size.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

MASKED = -10000.0
EPSILON = 1e-5


@dataclass(frozen=True)
class Sizes:
    """What the weights' shapes do not tell."""

    num_heads: int
    top_k: int
    aux_loss_coeff: float


class Reference:
    """The model; `weights` hold every expert, as mlp.experts.local_experts.N of the whole model."""

    def __init__(self, weights, sizes):
        self.weights, self.sizes = weights, sizes

    def losses(self, batch):
        """Returns the loss per token [B, T] of a T5Batch and the routers' losses, a number."""
        self.aux_loss = 0.0
        encoder_mask, decoder_mask = batch.encoder_mask, batch.decoder_mask
        source = self.stack("encoder", batch.encoder_tokens, encoder_mask, None, None)
        output = self.stack("decoder", batch.decoder_tokens, decoder_mask, source, encoder_mask)
        head = self.weights["embedding.word_embeddings.weight"]
        logits = output @ head.T + self.weights["lm_head.output_layer.bias"]
        losses = functional.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")
        return losses, self.aux_loss

    def stack(self, name, tokens, mask, source, source_mask):
        weights = self.weights
        x = weights["embedding.word_embeddings.weight"][tokens]
        x = x + weights["embedding.position_embeddings.weight"][: tokens.shape[1]]
        seen = mask[:, :, None] & mask[:, None, :]
        if source is not None:
            seen = seen & torch.ones(seen.shape[1:], dtype=torch.bool).tril()
        for layer in range(
            len({n.split(".")[2] for n in weights if n.startswith(f"{name}.layers")})
        ):
            at = f"{name}.layers.{layer}."
            h = self.norm(x, at + "input_layernorm.weight")
            q, k, v = self.heads(h, at + "self_attention.linear_qkv.weight", 3)
            x = x + self.attend(q, k, v, seen) @ weights[at + "self_attention.linear_proj.weight"].T
            if source is not None:
                h = self.norm(x, at + "pre_cross_attn_layernorm.weight")
                (q,) = self.heads(h, at + "cross_attention.linear_q.weight", 1)
                k, v = self.heads(source, at + "cross_attention.linear_kv.weight", 2)
                read = self.attend(q, k, v, mask[:, :, None] & source_mask[:, None, :])
                x = x + read @ weights[at + "cross_attention.linear_proj.weight"].T
            h = self.norm(x, at + "pre_mlp_layernorm.weight")
            has_experts = at + "mlp.router.weight" in weights
            x = x + (
                self.experts(h, mask, at) if has_experts else self.feed_forward(h, at + "mlp.")
            )
        return self.norm(x, f"{name}.final_layernorm.weight")

    def norm(self, x, weight):
        return x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * self.weights[weight]

    def heads(self, x, weight, parts):
        """Returns the parts of a projection whose rows go by head: [B, heads, positions, d]."""
        y = (x @ self.weights[weight].T).unflatten(-1, (self.sizes.num_heads, parts, -1))
        return [y[:, :, :, part].transpose(1, 2) for part in range(parts)]

    @staticmethod
    def attend(q, k, v, seen):
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(~seen[:, None], MASKED).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    def feed_forward(self, x, at):
        gate, up = (x @ self.weights[at + "linear_fc1.weight"].T).chunk(2, dim=-1)
        return functional.silu(gate) * up @ self.weights[at + "linear_fc2.weight"].T

    def experts(self, x, mask, at):
        rows, valid = x.flatten(0, 1), mask.flatten()
        logits = rows @ self.weights[at + "mlp.router.weight"].T
        top = logits.topk(self.sizes.top_k, dim=1)
        output = torch.zeros_like(rows)
        chosen = torch.zeros_like(logits)
        for position, probability in zip(top.indices.T, top.values.softmax(1).T, strict=True):
            for expert in range(logits.shape[1]):
                mine = position == expert
                out = self.feed_forward(rows[mine], f"{at}mlp.experts.local_experts.{expert}.")
                output = output.index_put(
                    (mine.nonzero()[:, 0],), probability[mine, None] * out, True
                )
            chosen += functional.one_hot(position, logits.shape[1])
        # Fedus et al. 2021, equation 4, over tokens that are no padding.
        tokens = valid.sum()
        share = chosen[valid].sum(0) / (tokens * self.sizes.top_k)
        probability = logits.softmax(1)[valid].sum(0) / tokens
        balance = logits.shape[1] * (share * probability).sum()
        self.aux_loss = self.aux_loss + self.sizes.aux_loss_coeff * balance
        return output.view_as(x)
