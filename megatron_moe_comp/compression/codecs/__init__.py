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

CODECS: dict[str, type[Codec]] = {
    codec.name: codec
    for codec in (
        Identity,
        RandomQuantization,
        Dithered,
        Gaussian,
        LinearQuantization,
        PiecewiseLinearQuantization,
        Shapeshifter,
        TernGrad,
        TopK,
        BFloat16Cast,
        Float16Cast,
        Int8,
        Float8,
        MxFloat8,
    )
}
"""Codec classes by their name; the options take their choices and ranges from here."""
