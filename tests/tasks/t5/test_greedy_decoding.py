"""Greedy decoding against a whole forward pass over every prefix, and its ranks' equal steps."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.saved_models import ALTERNATE, LENGTH, T5, UNTIED, VOCABULARY, build, make_config

TOKENIZER = SimpleNamespace(pad_id=0, eos_id=1, start_id=0, vocab_size=VOCABULARY - 10)
"""The model's vocabulary is padded."""
NEVER = -1
LAYOUTS = {
    "ep2": {},
    "tp2": {"parallel_output": True},
}
MODEL = T5 | UNTIED | ALTERNATE | {"init_method_std": 0.5}
ROPE = {"position_embedding_type": "rope"}
MODELS = {
    "rope": ROPE,
    "positions no longer than the answers": {},
    "relative": {"position_embedding_type": "relative"},
}


def tokenizer(eos_id):
    return SimpleNamespace(**vars(TOKENIZER) | {"eos_id": eos_id})


def make_model(layout, changes):
    """Returns a model whose answers depend on all it has seen and that prefers no real token."""
    from megatron.core import mpu
    from megatron.core.utils import unwrap_model

    model = build(make_config(layout, MODEL | LAYOUTS[layout] | changes))[0].eval()
    if mpu.get_tensor_model_parallel_rank() == mpu.get_tensor_model_parallel_world_size() - 1:
        with torch.no_grad():
            unwrap_model(model).output_layer.weight[TOKENIZER.vocab_size - VOCABULARY :] *= 5
    return model


def questions(rows, rank):
    """Returns rows of different lengths and their mask; other ones on each data parallel rank."""
    random = torch.Generator().manual_seed(100 + rank)
    tokens = torch.randint(2, TOKENIZER.vocab_size, (rows, LENGTH), generator=random)
    mask = torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (rows, 1), generator=random)
    return tokens.masked_fill(~mask, TOKENIZER.pad_id), mask


@torch.no_grad()
def naively(model, tokens, mask, steps):
    """Returns the most likely continuation of every prefix, with no end: [B, steps]."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    answers = tokens.new_full((len(tokens), 1), TOKENIZER.start_id)
    parallel = 2 if model.config.sequence_parallel else 1
    for length in range(1, steps + 1):
        # Sequence parallelism divides the positions.
        prefix = torch.nn.functional.pad(answers, (0, -length % parallel))
        real = (torch.arange(prefix.shape[1]) < length).expand_as(prefix)
        logits = model(tokens, prefix, mask, real)[:, length - 1]
        logits = gather_from_tensor_model_parallel_region(logits)
        assert (logits.argmax(dim=1) >= TOKENIZER.vocab_size).any()
        best = logits[:, : TOKENIZER.vocab_size].argmax(dim=1, keepdim=True)
        answers = torch.cat([answers, best], dim=1)
    return answers[:, 1:]


def ended(answers, eos_id):
    """Returns the naive answers with padding after their ends."""
    is_end = answers == eos_id
    after = is_end.cumsum(dim=1) - is_end.long() > 0
    return answers.masked_fill(after, TOKENIZER.pad_id)


def decodes_like_prefixes(rank, layout, changes):
    """Returns the tokens of this rank's answers without an end."""
    from megatron_moe_comp.tasks.t5.greedy_decoding import greedy_decode

    is_parallel = "parallel_output" in LAYOUTS[layout]
    model = make_model(layout, changes)
    parallel, data_rank = (2, 0) if is_parallel else (1, rank)
    # Rows differ in number and in length.
    tokens, mask = questions(3 - data_rank, data_rank)
    naive = naively(model, tokens, mask, LENGTH)

    def decode(eos_id):
        return greedy_decode(model, tokens, mask, tokenizer(eos_id), LENGTH, parallel)

    assert torch.equal(decode(NEVER), naive)
    # Ends that some rows, or all of a rank, come to early.
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, naive)
    for eos_id in sorted({int(answers[0, 2]) for answers in everyone}):
        steps = max(
            next((i + 1 for i, token in enumerate(row) if token == eos_id), LENGTH)
            for answers in everyone
            for row in answers.tolist()
        )
        assert torch.equal(decode(eos_id), ended(naive, eos_id)[:, :steps])
    return naive.unique().tolist()


@pytest.mark.parametrize(
    ("layout", "model"), [*(("ep2", name) for name in MODELS), ("tp2", "rope")]
)
def test_decoding_equals_a_forward_pass_over_each_prefix(pools, layout, model):
    found = pools(layout).run(decodes_like_prefixes, layout, MODELS[model])
    # A model that repeats one token would hide errors.
    assert len(set().union(*found)) > 6


class Script:
    """A model that says given answers and notes the decoder tokens that it was given."""

    def __init__(self, answers):
        self.answers = answers
        self.widths = []
        self.encoded = 0

    def __call__(
        self,
        encoder_tokens,
        decoder_tokens,
        encoder_mask,
        decoder_mask,
        encoder_hidden_states=None,
        output_encoder_hidden_only=False,
    ):
        if output_encoder_hidden_only:
            self.encoded += 1
            return torch.full((2,), 5.0)
        assert encoder_hidden_states.tolist() == [5.0, 5.0]
        step = int(decoder_mask.sum(dim=1).unique())
        assert not decoder_mask[:, step:].any()
        self.widths.append(decoder_tokens.shape[1])
        logits = torch.full((*decoder_tokens.shape, VOCABULARY), torch.nan)
        logits[:, step - 1] = torch.arange(VOCABULARY) * 1e-3
        for row, answer in enumerate(self.answers):
            # What is said after its end must not be heard.
            said = [TOKENIZER.start_id, *answer, *[9] * step]
            if TOKENIZER.eos_id not in answer[: step - 1]:
                assert decoder_tokens[row, :step].tolist() == said[:step]
            logits[row, step - 1, said[step]] = 1.0
        return logits


ANSWERS = {0: [[5, 1]], 1: [[1], [6, 7, 8, 1], [2, 1]]}
MAX_TOKENS = 18


def scripted(rank, answers, without_input=None):
    """Returns the decoded rows and the widths of the model's steps."""
    from megatron_moe_comp.tasks.t5.greedy_decoding import greedy_decode

    model = Script(answers[rank])
    token = TOKENIZER.pad_id if rank == without_input else 5
    tokens = torch.full((len(model.answers), 4), token)
    decoded = greedy_decode(model, tokens, tokens > 0, TOKENIZER, MAX_TOKENS)
    assert model.encoded == 1
    return decoded.tolist(), model.widths


def test_every_rank_goes_on_until_all_rows_have_ended(pools):
    (first, steps), (second, others) = pools("ep2").run(scripted, ANSWERS)
    assert first == [[5, 1, 0, 0]]
    assert second == [[1, 0, 0, 0], [6, 7, 8, 1], [2, 1, 0, 0]]
    assert steps == others == [16] * 4


def test_an_answer_without_end_stops_at_the_longest(pools):
    endless = [2 + number for number in range(30)]
    (first, steps), (second, others) = pools("ep2").run(scripted, ANSWERS | {1: [endless]})
    assert first == [[5, 1, *[0] * 16]]
    assert second == [endless[:MAX_TOKENS]]
    assert steps == others == [16] * 16 + [18] * 2


def test_a_rank_without_input_keeps_no_other_waiting(pools):
    answers = {0: [[TOKENIZER.pad_id] * 30], 1: [[5, 1]]}
    (first, steps), (second, others) = pools("ep2").run(scripted, answers, 0)
    assert first == [[0, 0]]
    assert second == [[5, 1]]
    assert steps == others == [16] * 2
