"""Megatron's own layer specs, with Transformer Engine's modules and with its local ones."""

import importlib
from dataclasses import fields, is_dataclass
from functools import partial
from types import SimpleNamespace

import pytest
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import default_layer_spec

from megatron_moe_comp.mcore.layer_specs import (
    compressed_layer_spec,
    sequence_parallel_norm,
    use_sequence_parallel_norms,
)

provider = importlib.import_module("megatron.core.extensions.transformer_engine_spec_provider")
GROUPED = ("TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear")


def layer(*args, **kwargs):
    """Stands for CompressedMoELayer."""


@pytest.fixture(autouse=True)
def one_pipeline_stage(monkeypatch):
    monkeypatch.setattr(gpt_layer_specs, "get_num_layers_to_build", lambda config, **_: 3)
    monkeypatch.setattr(gpt_layer_specs, "get_transformer_layer_offset", lambda config, **_: 0)


@pytest.fixture
def transformer_engine(monkeypatch):
    """Without it installed, what it lacks is a stand-in; who builds what is what counts."""
    for name in (*GROUPED, "TEActivationOp"):
        monkeypatch.setattr(provider, name, type(name, (), {}))
    monkeypatch.setattr(provider, "is_te_min_version", lambda _: True)
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", provider.TESpecProvider)
    monkeypatch.setattr(gpt_layer_specs, "TENorm", provider.TENorm)


def specs(implementation, **options):
    """Megatron's spec and ours, of a dense layer between two of experts."""
    config = TransformerConfig(
        num_layers=3,
        hidden_size=64,
        num_attention_heads=4,
        num_moe_experts=4,
        moe_layer_freq=[1, 0, 1],
        transformer_impl=implementation,
        **options,
    )
    model = SimpleNamespace(transformer=config, restore_modelopt_state=False)
    model.transformer_layer_spec = partial(
        compressed_layer_spec, base=default_layer_spec, layer=layer
    )
    use_sequence_parallel_norms(model)
    return default_layer_spec(model, None), model.transformer_layer_spec(model)


def leaves(spec, path=""):
    """What a spec consists of, by its place."""
    if isinstance(spec, partial):
        found = leaves(spec.func, f"{path}()") | leaves(spec.args, f"{path}()args")
        return found | leaves(spec.keywords, f"{path}()")
    if is_dataclass(spec) and not isinstance(spec, type):
        spec = {f.name: getattr(spec, f.name) for f in fields(spec) if f.init}
    if isinstance(spec, list | tuple):
        spec = dict(enumerate(spec))
    if isinstance(spec, dict):
        return {k: v for name, x in spec.items() for k, v in leaves(x, f"{path}.{name}").items()}
    return {path: spec}


def replaced(theirs, ours):
    theirs, ours = leaves(theirs), leaves(ours)
    assert theirs.keys() == ours.keys()
    return {path: (theirs[path], ours[path]) for path in theirs if theirs[path] != ours[path]}


MOE = {f".layer_specs.{i}.submodules.mlp()": (MoELayer, layer) for i in (0, 2)}


@pytest.mark.parametrize("grouped", [False, True])
def test_of_transformer_engine_only_the_moe_layers_are_replaced(transformer_engine, grouped):
    theirs, ours = specs("transformer_engine", moe_grouped_gemm=grouped)
    assert replaced(theirs, ours) == MOE
    assert ours.layer_norm is provider.TENorm
    moe, dense = ours.layer_specs[0].submodules, ours.layer_specs[1].submodules
    assert moe.pre_mlp_layernorm is provider._TENormWithResidual
    for block in (moe, dense):
        attention = block.self_attention.submodules
        assert attention.linear_qkv is provider.TELayerNormColumnParallelLinear
        assert attention.core_attention is provider.TEDotProductAttention
    experts = moe.mlp.keywords["submodules"].experts
    assert experts.func is (TEGroupedMLP if grouped else SequentialMLP)
    linear = GROUPED if grouped else ("TEColumnParallelLinear", "TERowParallelLinear")
    built = experts.keywords["submodules"]
    assert (built.linear_fc1, built.linear_fc2) == tuple(getattr(provider, n) for n in linear)


def test_of_the_local_ones_only_the_moe_layers_are_replaced():
    assert replaced(*specs("local")) == MOE


def test_sequence_parallelism_replaces_the_norms_too():
    parallel = {"sequence_parallel": True, "tensor_model_parallel_size": 2}
    changed = replaced(*specs("local", add_bias_linear=False, **parallel))
    norms = {path: pair for path, pair in changed.items() if path not in MOE}
    assert changed == MOE | norms
    assert set(norms.values()) == {(WrappedTorchNorm, sequence_parallel_norm)}
    assert ".layer_norm" in norms


def test_the_spec_of_megatron_is_not_changed():
    theirs, _ = specs("local")
    assert MoELayer in leaves(theirs).values()
    assert layer not in leaves(theirs).values()
