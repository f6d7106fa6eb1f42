"""The codecs by name. A new one is a file here and a line in CODECS."""

from megatron_moe_comp.compression.codec import Codec
from megatron_moe_comp.compression.codecs.cast import BFloat16Cast, Float16Cast
from megatron_moe_comp.compression.codecs.dithered import Dithered
from megatron_moe_comp.compression.codecs.fp8 import Float8
from megatron_moe_comp.compression.codecs.gaussian import Gaussian
from megatron_moe_comp.compression.codecs.identity import Identity
from megatron_moe_comp.compression.codecs.int8 import Int8
from megatron_moe_comp.compression.codecs.lq import LinearQuantization
from megatron_moe_comp.compression.codecs.mxfp8 import MxFloat8
from megatron_moe_comp.compression.codecs.pwlq import PiecewiseLinearQuantization
from megatron_moe_comp.compression.codecs.rq import RandomQuantization
from megatron_moe_comp.compression.codecs.shapeshifter import Shapeshifter
from megatron_moe_comp.compression.codecs.terngrad import TernGrad
from megatron_moe_comp.compression.codecs.topk import TopK
from megatron_moe_comp.options.config import CompressionConfig, Wire

CODECS: dict[str, type[Codec]] = {
    codec.name: codec
    for codec in (
        Identity,
        BFloat16Cast,
        Float16Cast,
        Int8,
        Float8,
        MxFloat8,
        RandomQuantization,
        Dithered,
        Gaussian,
        LinearQuantization,
        Shapeshifter,
        PiecewiseLinearQuantization,
        TernGrad,
        TopK,
    )
}
"""Codec classes by their name."""


def codec_of(config: CompressionConfig, wire: Wire) -> Codec:
    """Returns what encodes the rows of a wire."""
    if wire not in config.moe_a2a_wires:
        return Identity()
    name = config.coding(wire).codec
    return RandomQuantization(config.moe_a2a_scale_per) if name == "rq" else CODECS[name]()
