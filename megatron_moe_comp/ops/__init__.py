"""The contract of every kernel: schema, fake and a reference in plain PyTorch.

An op is registered under ``torch.ops.megatron_moe_comp`` with its reference as the kernel of every
device; a compiled kernel overrides it by dispatch key, and call sites do not change. The same
arguments give the same bytes from every kernel.
"""

import torch

from megatron_moe_comp.ops.quantize_pack import absmax, packed_bytes, quantize_pack
from megatron_moe_comp.ops.segments import OpSegment, flatten
from megatron_moe_comp.ops.unpack_dequantize import unpack_dequantize

__all__ = [
    "OpSegment",
    "absmax",
    "flatten",
    "is_compiled",
    "packed_bytes",
    "quantize_pack",
    "unpack_dequantize",
]


def is_compiled(device_type: str) -> bool:
    """Returns whether a compiled kernel serves this device ("cpu" or "cuda")."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        "megatron_moe_comp::quantize_pack", device_type.upper()
    )
