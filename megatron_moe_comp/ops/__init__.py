"""The contract of every kernel: schema, fake and a reference in plain PyTorch.

An op is registered under ``torch.ops.megatron_moe_comp`` with its reference as the kernel of every
device; a compiled kernel overrides it by dispatch key, and call sites do not change. The same
arguments give the same bytes from every kernel. The compiled kernels are extension modules of the
package, built by setup.py from kernels/.
"""

import importlib
import importlib.util

import torch

from megatron_moe_comp.ops.allocate_bits import allocate_bits
from megatron_moe_comp.ops.cast_pack import CAST_FORMATS, cast_pack, unpack_cast
from megatron_moe_comp.ops.cluster_sum import cluster_broadcast, cluster_sum
from megatron_moe_comp.ops.gaussian import gaussian_pack, gaussian_unpack
from megatron_moe_comp.ops.lsh_hash import dense_hash, hadamard_hash
from megatron_moe_comp.ops.quantize_pack import absmax, packed_bytes, quantize_pack
from megatron_moe_comp.ops.segments import OpSegment, flatten
from megatron_moe_comp.ops.unpack_dequantize import unpack_dequantize
from megatron_moe_comp.ops.unpack_dithered import unpack_dithered

__all__ = [
    "CAST_FORMATS",
    "OpSegment",
    "absmax",
    "allocate_bits",
    "cast_pack",
    "cluster_broadcast",
    "cluster_sum",
    "dense_hash",
    "flatten",
    "gaussian_pack",
    "gaussian_unpack",
    "hadamard_hash",
    "is_compiled",
    "packed_bytes",
    "quantize_pack",
    "unpack_cast",
    "unpack_dequantize",
    "unpack_dithered",
]


def is_compiled(device_type: str, op: str = "quantize_pack") -> bool:
    """Returns whether a compiled kernel of an op serves this device ("cpu" or "cuda")."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        f"megatron_moe_comp::{op}", device_type.upper()
    )


def _load_compiled_kernels() -> None:
    """Loads the extension modules that were built, whose kernels override the references.

    Raises:
        ImportError: one exists but does not load: it was built against another torch.
    """
    names = ["_kernels_cpu"]
    if torch.cuda.is_available():
        names.append("_kernels_cuda")
    for name in (f"megatron_moe_comp.{name}" for name in names):
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)


_load_compiled_kernels()
