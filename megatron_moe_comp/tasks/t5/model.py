"""T5-MoE: Megatron's T5 with experts, padding kept out of the routers, and both stacks configured.

B: micro-batch, S: encoder positions, T: decoder positions.
"""

import copy
from argparse import Namespace
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from megatron.core.datasets.t5_dataset import T5MaskedWordPieceDataset
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, set_moe_metrics_tracker
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_moe_comp.options.checks import flag
from megatron_moe_comp.options.t5_options import Activation, T5Options
from megatron_moe_comp.tasks.t5.biased_attention import carry_bias_gradient
from megatron_moe_comp.tasks.t5.specs import moe_layer_pattern, t5_block_specs

BlockSpecs = tuple[TransformerBlockSubmodules, TransformerBlockSubmodules]


@dataclass(kw_only=True)
class T5ModelConfig(GPTModelConfig):
    """Megatron's model configuration with a decoder (`transformer`) and an encoder."""

    builder: ClassVar[str] = "megatron_moe_comp.tasks.t5.model.T5ModelBuilder"

    encoder: TransformerConfig | None = None
    """As `transformer`, but for the number of layers and which of them have experts."""

    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128

    @property
    def stacks(self) -> tuple[TransformerConfig, TransformerConfig]:
        """The configurations of encoder and decoder."""
        assert self.encoder is not None, "t5_config_from_args() sets it"
        return self.encoder, self.transformer

    @property
    def layer_names(self) -> list[str]:
        """What to call the layers, in the order of the numbers that MoE layers have."""
        return [
            f"{stack} layer {number + 1}"
            for stack, config in zip(("encoder", "decoder"), self.stacks, strict=True)
            for number in range(config.num_layers)
        ]

    @property
    def moe_layer_pattern(self) -> list[int]:
        """Which layers have experts, the encoder's first; none in a dense model."""
        return [
            has_experts
            for config in self.stacks
            for has_experts in (
                config.moe_layer_freq if config.num_moe_experts else [0] * config.num_layers
            )
        ]


def t5_config_from_args(args: Namespace, options: T5Options) -> T5ModelConfig:
    """Returns the model configuration that Megatron's flags and ours describe.

    Raises:
        ValueError: an option that this model cannot work with.
    """
    _check_args(args)
    config: T5ModelConfig = gpt_config_from_args(args, model_config_cls=T5ModelConfig)
    _set_activation(config.transformer, options.t5_activation)
    if options.t5_relative_positions:
        config.position_embedding_type = "relative"
    config.relative_attention_num_buckets = args.relative_attention_num_buckets
    config.relative_attention_max_distance = args.relative_attention_max_distance
    config.transformer_layer_spec = t5_layer_specs
    config.encoder = copy.copy(config.transformer)
    config.encoder.num_layers = args.encoder_num_layers
    config.transformer.num_layers = args.decoder_num_layers or args.encoder_num_layers
    if args.num_experts is not None:
        for stack in config.stacks:
            stack.moe_layer_freq = moe_layer_pattern(args.moe_layer_freq, stack.num_layers)
    return config


def _check_args(args: Namespace) -> None:
    for option, allowed, why in (
        ("pipeline_model_parallel_size", (1,), "Megatron's T5 has no pipeline stages"),
        ("context_parallel_size", (1,), "cross-attention sees the whole encoder"),
        ("mtp_num_layers", (None,), "multi-token prediction is for decoder-only models"),
        ("multi_latent_attention", (False,), "there is no layer specification for it"),
        ("spec", (None,), "the layers of encoder and decoder are specified here"),
        ("moe_use_upcycling", (False,), "Megatron's own conversion knows GPT only"),
        ("use_legacy_models", (False,), "there are no legacy T5 models"),
    ):
        value = getattr(args, option, allowed[0])
        if value not in allowed:
            raise ValueError(f"{flag(option)}={value}: not with T5, since {why}. Drop the option.")
    biased = args.num_experts is not None and args.add_bias_linear
    if biased and args.expert_model_parallel_size == 1 and args.transformer_impl == "local":
        raise ValueError(
            "--expert-model-parallel-size=1: Megatron's local experts cannot add their biases in "
            "place without expert parallelism. Use --disable-bias-linear, as T5 does, or 2 or more."
        )


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """Returns the tanh approximation of GELU, as T5 1.1 uses it."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def _set_activation(config: TransformerConfig, activation: Activation | None) -> None:
    if config.num_moe_experts is not None and config.activation_func is torch.nn.functional.gelu:
        # Megatron's fused kernel does not apply probabilities, and its experts refuse it.
        config.bias_activation_fusion = False
    if activation is None:
        return
    config.gated_linear_unit = activation == "geglu"
    config.activation_func = gelu_tanh if activation == "geglu" else torch.nn.functional.relu
    config.bias_activation_fusion = False


def t5_layer_specs(config: T5ModelConfig, vp_stage: int | None = None) -> BlockSpecs:
    """Returns the specs of encoder and decoder (a `transformer_layer_spec` function)."""
    assert vp_stage is None
    return t5_block_specs(*config.stacks)


class T5MoEModel(T5Model):
    """Megatron's T5 that takes token masks, and tells the routers which tokens are padding.

    MoE layers of the decoder are numbered after the encoder's, so that each has its own place in
    statistics, router losses, clustering states and random streams.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self._padding: dict[TransformerBlock, torch.Tensor] = {}
        for block in (self.encoder, self.decoder):
            block.register_forward_pre_hook(self._with_padding_mask, with_kwargs=True)
            block.register_forward_pre_hook(carry_bias_gradient, with_kwargs=True)
        for layer in self.decoder.layers:
            if isinstance(layer.mlp, MoELayer):
                number = self.encoder_config.num_layers + layer.layer_number
                layer.mlp.set_layer_number(number)

    def forward(
        self,
        encoder_tokens: torch.Tensor,
        decoder_tokens: torch.Tensor,
        encoder_mask: torch.Tensor,
        decoder_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        output_encoder_hidden_only: bool = False,
    ) -> torch.Tensor:
        """Returns the loss per token [B, T], or without labels the logits [B, T, vocabulary].

        Args:
            encoder_tokens: int64 [B, S].
            decoder_tokens: int64 [B, T], the target shifted right.
            encoder_mask: bool [B, S], False for padding.
            decoder_mask: bool [B, T], False for padding.
            labels: int64 [B, T]; a negative one has no meaning for the loss.
            encoder_hidden_states: of an earlier call with the same encoder tokens.
            output_encoder_hidden_only: return these.
        """
        if encoder_hidden_states is not None:
            # Megatron's wrapper turned them into float32 on their way out.
            encoder_hidden_states = encoder_hidden_states.to(self.config.params_dtype)
        self._padding = {self.encoder: ~encoder_mask, self.decoder: ~decoder_mask}
        masks = T5MaskedWordPieceDataset.config_attention_mask(
            encoder_mask.long(),
            decoder_mask.long(),
            ~encoder_mask,
            ~decoder_mask,
            use_local=self.config.transformer_impl == "local",
        )
        output = super().forward(
            encoder_tokens,
            decoder_tokens,
            *masks,
            lm_labels=labels,
            encoder_hidden_states=encoder_hidden_states,
            output_encoder_hidden_only=output_encoder_hidden_only,
        )
        self._padding = {}
        return output

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401
        """Returns what a checkpoint holds; see T5Model.sharded_state_dict.

        The output layer has two names here, and Megatron lets the padding of the vocabulary,
        which depends on the tensor parallel size, differ from the checkpoint's under one of them.
        """
        state = super().sharded_state_dict(prefix, *args, **kwargs)
        for name in ("weight", "bias"):
            tensor = state.get(f"{prefix}lm_head.output_layer.{name}")
            if tensor is not None:
                tensor.allow_shape_mismatch = True
        return state

    def _with_padding_mask(
        self, block: TransformerBlock, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns a block's arguments with the padding that T5Model.forward has no place for."""
        padding = self._padding[block]
        if self.config.sequence_parallel:
            part = scatter_to_sequence_parallel_region(
                padding.transpose(0, 1).contiguous(), group=self.tp_group
            )
            padding = part.transpose(0, 1)
        return args, kwargs | {"padding_mask": padding}


class T5ModelBuilder(GPTModelBuilder):
    """Builds T5MoEModel from a T5ModelConfig; wraps it as Megatron wraps GPT."""

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> T5MoEModel:
        """Returns the whole model: T5 has one pipeline stage."""
        assert pre_process in (None, True)
        assert post_process in (None, True)
        assert vp_stage is None
        config: T5ModelConfig = self._model_config
        encoder_spec, decoder_spec = config.transformer_layer_spec(config, vp_stage=vp_stage)
        vocab_size = config.vocab_size
        if config.should_pad_vocab:
            vocab_size = calculate_padded_vocab_size(
                vocab_size,
                config.make_vocab_size_divisible_by,
                config.transformer.tensor_model_parallel_size,
            )
        encoder, decoder = config.stacks
        if any(config.moe_layer_pattern):
            set_moe_metrics_tracker(EncoderDecoderMetricsTracker(config.moe_layer_pattern))
        return T5MoEModel(
            config=decoder,
            encoder_config=encoder,
            transformer_encoder_layer_spec=encoder_spec,
            transformer_decoder_layer_spec=decoder_spec,
            vocab_size=vocab_size,
            max_sequence_length=config.seq_length,
            fp16_lm_cross_entropy=config.fp16_lm_cross_entropy,
            parallel_output=config.parallel_output,
            share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
            position_embedding_type=config.position_embedding_type,
            rotary_percent=config.rotary_percent,
            seq_len_interpolation_factor=config.seq_len_interpolation_factor,
            relative_attention_num_buckets=config.relative_attention_num_buckets,
            relative_attention_max_distance=config.relative_attention_max_distance,
            pg_collection=pg_collection,
        )


class EncoderDecoderMetricsTracker(MoEMetricsTracker):
    """Megatron's tracker of router losses with a place for every layer of both stacks.

    Megatron's counts layers by --num-layers, the encoder's; the loss it reports is then the mean
    over all MoE layers of encoder and decoder.

    Args:
        pattern: which layers have experts, see `T5ModelConfig.moe_layer_pattern`.
    """

    def __init__(self, pattern: list[int]) -> None:
        super().__init__()
        self._pattern = pattern

    def record(
        self,
        name: str,
        value: torch.Tensor,
        layer_number: int,
        num_layers: int,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Adds a layer's loss; see MoEMetricsTracker.record."""
        super().record(name, value, layer_number, len(self._pattern), **kwargs)

    def report(self, *args: Any, **kwargs: Any) -> str:  # noqa: ANN401
        """Returns the log line of the iteration; see MoEMetricsTracker.report."""
        both = {"num_layers": len(self._pattern), "moe_layer_freq": self._pattern}
        return super().report(*args, **kwargs | both)
