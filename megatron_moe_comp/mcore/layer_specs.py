"""Two passes over Megatron's layer specs: our MoE layer, and norms for sequence parallelism."""

import copy
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_moe_comp.compression.random_stream import TrainingStep
from megatron_moe_comp.mcore.moe_layer import CompressedMoELayer
from megatron_moe_comp.options.config import CompressionConfig

Spec = ModuleSpec | TransformerBlockSubmodules


def use_compressed_moe(
    model_config: GPTModelConfig, compression: CompressionConfig, step: Callable[[], TrainingStep]
) -> None:
    """Makes `model_config` build its MoE layers as CompressedMoELayer.

    A spec that the configuration already names (--spec) is kept but for its MoE layers.

    Args:
        model_config: changed in place.
        compression: options of the all-to-alls.
        step: returns the current training step.

    Raises:
        ValueError: a model option cannot work with compression.
    """
    compression.check_model(model_config.transformer)
    model_config.transformer_layer_spec = partial(
        compressed_layer_spec,
        base=model_config.transformer_layer_spec or default_layer_spec,
        layer=partial(CompressedMoELayer, compression=compression, step=step),
    )
    model_config.post_wrap_hooks.append(partial(_check_every_moe_layer, compression))


def compressed_layer_spec(
    model_config: GPTModelConfig,
    vp_stage: int | None = None,
    *,
    base: Spec | Callable[..., Spec],
    layer: Callable[..., CompressedMoELayer],
) -> Spec:
    """Returns the base spec with every MoELayer built by `layer` instead.

    Args:
        model_config: passed to `base`.
        vp_stage: virtual pipeline stage, passed to `base`.
        base: a spec, or a function of (model_config, vp_stage) that returns one.
        layer: builds the MoE layer, with MoELayer's arguments.
    """
    return _replaced(_spec_of(base, model_config, vp_stage), MoELayer, layer)


def use_sequence_parallel_norms(model_config: GPTModelConfig) -> None:
    """Makes `model_config` build torch's norms in a form that sequence parallelism can use.

    Nothing of compression needs this. Without Transformer Engine and Apex, Megatron's specs name
    its wrapper of the torch norms, and that wrapper refuses --sequence-parallel, which Megatron
    requires of MoE models with tensor parallelism. Without the option nothing is changed.

    Args:
        model_config: changed in place.
    """
    if model_config.transformer.sequence_parallel:
        model_config.transformer_layer_spec = partial(
            _with_sequence_parallel_norms,
            base=model_config.transformer_layer_spec or default_layer_spec,
        )


def _with_sequence_parallel_norms(
    model_config: GPTModelConfig, vp_stage: int | None = None, *, base: Spec | Callable[..., Spec]
) -> Spec:
    spec = _spec_of(base, model_config, vp_stage)
    return _replaced(spec, WrappedTorchNorm, sequence_parallel_norm)


def _spec_of(
    base: Spec | Callable[..., Spec], model_config: GPTModelConfig, vp_stage: int | None
) -> Spec:
    return base if isinstance(base, Spec) else base(model_config, vp_stage)


def sequence_parallel_norm(
    config: TransformerConfig, hidden_size: int, eps: float = 1e-5
) -> torch.nn.Module:
    """Returns torch's LayerNorm or RMSNorm, also usable with sequence parallelism.

    Megatron's wrapper of the torch norms refuses sequence parallelism, since their weights see a
    slice of the sequence on each rank; it sums such gradients for weights that carry this mark.
    """
    without = copy.copy(config)
    without.sequence_parallel = False
    norm = WrappedTorchNorm(without, hidden_size, eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm


def _replaced(spec: Any, old: type, new: Callable[..., Any]) -> Any:  # noqa: ANN401
    """Returns a copy of a (nested) spec that builds with `new` what `old` built."""
    if spec is old:
        return new
    if isinstance(spec, partial):
        return partial(_replaced(spec.func, old, new), *spec.args, **spec.keywords)
    if isinstance(spec, list | tuple):
        return type(spec)(_replaced(item, old, new) for item in spec)
    if is_dataclass(spec) and not isinstance(spec, type):
        names = [f.name for f in fields(spec) if f.init]
        return replace(spec, **{name: _replaced(getattr(spec, name), old, new) for name in names})
    return spec


def _check_every_moe_layer(
    compression: CompressionConfig, models: list[MegatronModule]
) -> list[MegatronModule]:
    """Returns `models`; raises where a spec hid an MoE layer from us (a `post_wrap_hook`)."""
    for model in models:
        for name, module in model.named_modules():
            stock = isinstance(module, MoELayer) and not isinstance(module, CompressedMoELayer)
            if stock and compression.enabled:
                raise ValueError(
                    f"--moe-a2a-compress={compression.moe_a2a_compress}: the layer {name} is a "
                    f"{type(module).__name__} whose spec could not be replaced, so it would train "
                    "uncompressed. Use Megatron's own layer specs, or --moe-a2a-compress=none."
                )
    return models
