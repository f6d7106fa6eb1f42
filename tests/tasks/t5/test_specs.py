"""T5-MoE layer specs: which layers have experts, and what each variant is built of."""

import importlib
from types import SimpleNamespace

import pytest
from megatron.core.models.T5 import t5_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from megatron_moe_comp.tasks.t5 import specs
from megatron_moe_comp.tasks.t5.biased_attention import BiasedDotProductAttention

TE_NAMES = (
    "TEColumnParallelLinear",
    "TEDotProductAttention",
    "TELayerNormColumnParallelLinear",
    "TENorm",
    "TERowParallelLinear",
)


@pytest.mark.parametrize(
    ("freq", "num_layers", "pattern"),
    [
        (1, 3, [1, 1, 1]),
        (2, 5, [1, 0, 1, 0, 1]),
        (4, 3, [1, 0, 0]),
        ([0, 1, 0], 3, [0, 1, 0]),
    ],
)
def test_which_layers_have_experts(freq, num_layers, pattern):
    assert specs.moe_layer_pattern(freq, num_layers) == pattern


@pytest.mark.parametrize("freq", [[1, 0], [1, 0, 1, 0], [1, 0, 2]])
def test_an_unusable_list_is_refused(freq):
    with pytest.raises(ValueError, match=r"--moe-layer-freq=.*3 layers.*Write one number"):
        specs.moe_layer_pattern(freq, 3)


def stacks(implementation, normalization="LayerNorm"):
    return [
        SimpleNamespace(
            transformer_impl=implementation,
            normalization=normalization,
            num_moe_experts=4,
            moe_grouped_gemm=False,
            moe_layer_freq=pattern,
            num_layers=len(pattern),
        )
        for pattern in ([0, 1], [1, 0, 0])
    ]


def is_moe(layer):
    return getattr(layer.submodules.mlp, "func", None) is MoELayer


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_local(normalization):
    blocks = specs.t5_block_specs(*stacks("local", normalization))
    for block, pattern in zip(blocks, ([0, 1], [1, 0, 0]), strict=True):
        assert [is_moe(layer) for layer in block.layer_specs] == [bool(p) for p in pattern]
        rms = normalization == "RMSNorm"
        assert block.layer_norm is (WrappedTorchNorm if rms else specs.LNImpl)
        for layer in block.layer_specs:
            core = layer.submodules.self_attention.submodules.core_attention
            assert core is BiasedDotProductAttention
            renamed = layer.submodules.sharded_state_dict_keys_map
            assert ("pre_mlp_layernorm." in renamed) != is_moe(layer)


def test_transformer_engine(monkeypatch):
    """Without it installed, its modules are stand-ins; who builds what is what counts."""
    for name in TE_NAMES:
        monkeypatch.setattr(t5_spec, name, type(name, (), {}))
    modules = importlib.import_module("megatron.core.models.gpt.moe_module_specs")
    monkeypatch.setattr(modules, "TESpecProvider", modules.LocalSpecProvider)
    monkeypatch.setattr(specs, "TENorm", t5_spec.TENorm)
    blocks = specs.t5_block_specs(*stacks("transformer_engine"))
    for block, pattern in zip(blocks, ([0, 1], [1, 0, 0]), strict=True):
        assert [is_moe(layer) for layer in block.layer_specs] == [bool(p) for p in pattern]
        assert block.layer_norm is t5_spec.TENorm
        for layer in block.layer_specs:
            # The dense feed-forward's first linear layer has the norm in it.
            norm = layer.submodules.pre_mlp_layernorm
            assert norm is (t5_spec.TENorm if is_moe(layer) else IdentityOp)
    cross = blocks[1].layer_specs[0].submodules
    assert cross.cross_attention.submodules.core_attention is t5_spec.TEDotProductAttention
    assert cross.pre_cross_attn_layernorm is t5_spec.TENorm
