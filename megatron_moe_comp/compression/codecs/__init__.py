"""The codecs by name. A new one is a file here and a line in CODECS."""

from megatron_moe_comp.compression.codec import Codec
from megatron_moe_comp.compression.codecs.identity import Identity
from megatron_moe_comp.compression.codecs.rq import RandomQuantization

CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (Identity, RandomQuantization)}
"""Codec classes by their name."""
