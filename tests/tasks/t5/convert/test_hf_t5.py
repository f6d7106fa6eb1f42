"""Converted T5 models against transformers', through the files of both."""

import json
import sys
from contextlib import closing

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from megatron_moe_comp.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_moe_comp.tasks.t5.convert import hf_t5
from megatron_moe_comp.tasks.t5.convert.hf_t5_files import ConversionError
from tests.gloo import PROCESSES, GlooPool

PIECES, SENTINELS = 300, 100
TOLERANCE = 1e-4
REMOVED = object()

MODELS = {
    "T5": {},
    "T5 of 4 layers and 2": {"num_layers": 4, "num_decoder_layers": 2, "format": "shards"},
    "T5 1.1": {"feed_forward_proj": "gated-gelu", "untied": True},
    "vocabulary of 450": {"feed_forward_proj": "gated-gelu", "vocab_size": 450, "format": "bin"},
}


def make_directory(directory, untied=False, format="safetensors", **changes):
    """Returns transformers' model of what it wrote there."""
    torch.manual_seed(1)
    config = T5Config(
        **{
            "vocab_size": 512,
            "d_model": 48,
            "d_kv": 8,
            "num_heads": 4,
            "d_ff": 96,
            "num_layers": 2,
            "num_decoder_layers": 3,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 20,
        }
        | changes
    )
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "relative_attention_bias" in name:
                parameter.normal_()
    if untied:
        model.lm_head.weight = torch.nn.Parameter(0.1 * torch.randn_like(model.shared.weight))
    model.save_pretrained(directory, max_shard_size="40KB" if format == "shards" else "1GB")
    if format == "bin":
        torch.save(model.state_dict(), directory / "pytorch_model.bin")
        (directory / "model.safetensors").unlink()
    # As published: transformers 5 writes that all are tied, and beside it whether to scale.
    change_config(directory, tie_word_embeddings=not untied, scale_decoder_outputs=REMOVED)
    (directory / "spiece.model").write_bytes(
        train_tokenizer(["a few words of longer text " * 9], 300)
    )
    return T5ForConditionalGeneration.from_pretrained(directory).eval()


def change_config(directory, **changes):
    path = directory / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not REMOVED}))


def make_batch(vocab_size):
    """Tokens and masks of encoder and decoder, of three samples with unequal lengths."""
    generator = torch.Generator().manual_seed(2)
    batch = []
    for lengths in ([40, 33, 7], [30, 4, 21]):
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        tokens = torch.randint(1, vocab_size, mask.shape, generator=generator)
        batch.append((tokens * mask, mask))
    (encoder_tokens, encoder_mask), (decoder_tokens, decoder_mask) = batch
    return encoder_tokens, decoder_tokens, encoder_mask, decoder_mask


def convert(source, output):
    hf_t5.convert(source, output)


def initialize_tensor_parallel(rank):
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    from megatron_moe_comp.cpu_host import patches

    patches.enable()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    tensor_parallel.model_parallel_cuda_manual_seed(1)


@pytest.fixture(scope="module")
def tensor_parallel_pools():
    with (
        closing(GlooPool(1, initialize_tensor_parallel)) as alone,
        closing(GlooPool(2, initialize_tensor_parallel)) as pair,
    ):
        yield alone, pair


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS.keys())
def converted(request, tmp_path_factory):
    """transformers' model, and the directory of Megatron's."""
    source, output = tmp_path_factory.mktemp("hf"), tmp_path_factory.mktemp("megatron")
    model = make_directory(source, **request.param)
    # A process of its own: it starts Megatron, and children that write the checkpoint.
    process = PROCESSES.Process(target=convert, args=(source, output))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    return model, output


def run_converted(rank, directory, batch, *more_flags):
    """The logits of the model that the directory's flags and checkpoint make."""
    import torch.distributed as dist
    from megatron.core import tensor_parallel
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.global_vars import destroy_global_vars

    from megatron_moe_comp.tasks.t5.model import T5ModelBuilder, t5_config_from_args
    from megatron_moe_comp.training import arguments, run

    flags = (directory / "model.args").read_text().split()
    flags += ["--tensor-model-parallel-size", str(dist.get_world_size()), "--load", str(directory)]
    flags += ["--micro-batch-size", "1", "--seq-length", "512", "--max-position-embeddings", "512"]
    sys.argv[1:] = [*flags, *more_flags]
    destroy_global_vars()
    destroy_num_microbatches_calculator()
    args, _ = run.parse_args(arguments.add_t5_args)
    config = t5_config_from_args(args, arguments.t5_options_from_args(args))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = T5ModelBuilder(config).build_model(groups).eval()
    iteration, _ = load_checkpoint([model], None, None)
    assert iteration == 0
    with torch.no_grad():
        return tensor_parallel.gather_from_tensor_model_parallel_region(model(*batch))


def test_logits_equal_those_of_transformers(converted, tensor_parallel_pools):
    model, directory = converted
    batch = make_batch(model.config.vocab_size)
    encoder_tokens, decoder_tokens, encoder_mask, decoder_mask = batch
    with torch.no_grad():
        expected = model(
            input_ids=encoder_tokens,
            attention_mask=encoder_mask,
            decoder_input_ids=decoder_tokens,
            decoder_attention_mask=decoder_mask,
        ).logits[decoder_mask]
    assert expected.std() > 0.1
    for pool in tensor_parallel_pools:
        for logits in pool.run(run_converted, directory, batch):
            assert logits.shape[-1] == model.config.vocab_size
            difference = (logits[decoder_mask] - expected).abs().max().item()
            print(f"\nlargest difference {difference:.1e} of logits with std {expected.std():.2f}")
            assert difference < TOLERANCE


def test_loads_into_a_larger_padded_vocabulary(converted, tensor_parallel_pools):
    model, directory = converted
    size = model.config.vocab_size
    batch = make_batch(size)
    larger = ("--padded-vocab-size", str(size + 6))
    for pool in tensor_parallel_pools:
        expected = pool.run(run_converted, directory, batch)[0]
        actual = pool.run(run_converted, directory, batch, *larger)[0]
        torch.testing.assert_close(actual[..., :size], expected)


def test_tokenizer_and_flags(converted):
    model, directory = converted
    tokenizer = load_tokenizer((directory / "spiece.model").read_bytes())
    assert tokenizer.vocab_size() == PIECES + SENTINELS
    flags = (directory / "model.args").read_text()
    assert f"--tokenizer-model {directory}/spiece.model" in flags
    assert f"--padded-vocab-size {model.config.vocab_size} " in flags


def write_umt5(directory):
    change_config(directory, model_type="umt5")


def write_silu(directory):
    change_config(directory, feed_forward_proj="gated-silu")


def deepen(directory):
    change_config(directory, num_layers=3)


def make_shallow(directory):
    change_config(directory, num_decoder_layers=2)


def widen(directory):
    change_config(directory, d_ff=100)


def remove_weights(directory):
    (directory / "model.safetensors").unlink()


def remove_config(directory):
    (directory / "config.json").unlink()


def shrink_vocabulary(directory):
    change_config(directory, vocab_size=399)


REFUSALS = {
    write_umt5: r"model_type is 'umt5'.*Give a directory of T5",
    write_silu: r"feed_forward_proj is 'gated-silu'.*relu and gated-gelu",
    deepen: r"encoder\.block\.2\.layer\.0\.layer_norm\.weight \[48\] is missing",
    make_shallow: r"decoder\.block\.2\.layer\S+ \[.*\] would be left unused.* and \d+ more",
    widen: r"DenseReluDense\.wi\.weight is \[96, 48\] in place of \[100, 48\]",
    remove_weights: r"has no weights. Put one of model\.safetensors",
    remove_config: r"config\.json: cannot be read",
    shrink_vocabulary: r"has 400 pieces with its 100 sentinels, and the model only 399",
}


@pytest.mark.parametrize("damage", REFUSALS, ids=lambda damage: damage.__name__)
def test_refuses_what_is_not_t5(tmp_path, damage):
    (tmp_path / "hf").mkdir()
    make_directory(tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(ConversionError, match=REFUSALS[damage]):
        hf_t5.convert(tmp_path / "hf", tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


def test_refuses_to_overwrite(tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    assert hf_t5.main(["--input", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert "holds something already" in capsys.readouterr().err
