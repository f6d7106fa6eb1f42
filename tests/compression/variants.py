"""The codecs under test, and rows through them as on the wire."""

import math

import torch

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
from megatron_moe_comp.compression.packet import Packet, Peer
from megatron_moe_comp.compression.random_stream import RandomStream

RANDOM = RandomStream(key=1, offset=2, stream=3)
VARIANTS = {
    "identity": Identity(),
    "bf16": BFloat16Cast(),
    "fp16": Float16Cast(),
    "int8": Int8(),
    "fp8": Float8(),
    "mxfp8": MxFloat8(),
    "rq-row": RandomQuantization(scale_per="row"),
    "rq-chunk": RandomQuantization(scale_per="chunk"),
    "dithered": Dithered(),
    "gaussian": Gaussian(),
    "lq": LinearQuantization(),
    "shapeshifter": Shapeshifter(),
    "pwlq": PiecewiseLinearQuantization(),
    "terngrad": TernGrad(),
    "topk": TopK(),
}
RANDOM_VARIANTS = {"rq-row", "rq-chunk", "dithered", "terngrad"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEGMENT_ROWS = (5, 0, 11)


def all_bits(codec):
    low, high = codec.num_bits_range or (6, 6)
    return range(low, high + 1)


VARIANTS_AND_BITS = [(name, b) for name, codec in VARIANTS.items() for b in all_bits(codec)]


def usual_bits(codec):
    return min(6, all_bits(codec)[-1])


def plan(codec, rows, segment_rows=SEGMENT_ROWS, num_bits=None, piece=0, num_pieces=1):
    """Of rows for other ranks only; num_bits may be one for each rank."""
    num_bits = num_bits or usual_bits(codec)
    bits = num_bits if isinstance(num_bits, tuple) else (num_bits,) * len(segment_rows)
    peers = [Peer(n, b, codec) for n, b in zip(segment_rows, bits, strict=True)]
    return Packet.plan(peers, -1, rows, piece=piece, num_pieces=num_pieces)


def roundtrip(codec, rows, segment_rows=None, num_bits=None, random=RANDOM, num_pieces=1):
    """Through packets, into rows that are poisoned."""
    segment_rows = (len(rows),) if segment_rows is None else segment_rows
    decoded = torch.full_like(rows, math.nan)
    for piece in range(num_pieces):
        packet = plan(codec, rows, segment_rows, num_bits, piece, num_pieces)
        packet.decode(packet.encode(rows, [], random), decoded, [], random)
    return decoded


def normal_rows(dtype=torch.float32, hidden=256, num_rows=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_rows, hidden, generator=generator).to(dtype)


def sqnr(rows, decoded):
    rows, decoded = rows.double(), decoded.double()
    return 10 * torch.log10(rows.square().sum() / (rows - decoded).square().sum()).item()
