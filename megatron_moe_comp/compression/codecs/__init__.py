"""The codecs by name. A new one is a file here and a line in CODECS."""

from megatron_moe_comp.compression.codec import Codec
from megatron_moe_comp.compression.codecs.identity import Identity
from megatron_moe_comp.compression.codecs.rq import RandomQuantization
from megatron_moe_comp.config import CompressionConfig

CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (Identity, RandomQuantization)}
"""Codec classes by their name."""


def codec_of(config: CompressionConfig) -> Codec:
    """Returns the codec of the configured method: birdmoe's is rq, others have their own name."""
    if config.moe_a2a_compress in ("birdmoe", RandomQuantization.name):
        return RandomQuantization(config.moe_a2a_scale_per)
    return CODECS[config.moe_a2a_compress]()
