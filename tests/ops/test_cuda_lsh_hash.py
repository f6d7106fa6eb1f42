"""The CUDA kernels of the hashes, run on the CPU by tests/cuda_emulation, against the reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_comp.ops.lsh_hash import _dense_reference, _hadamard_reference, padded_size
from tests.cuda_emulation import build
from tests.cuda_emulation.gpu import GpuKernels
from tests.cuda_emulation.kernels import ROW_TYPES, EmulatedKernels

pytestmark = pytest.mark.skipif(build.missing_tool() is not None, reason=str(build.missing_tool()))

REFERENCES = {"hadamard_hash": _hadamard_reference, "dense_hash": _dense_reference}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_op = pytest.mark.parametrize("op", REFERENCES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(scope="module", params=["forward", "reverse"] + ["gpu"] * torch.cuda.is_available())
def kernels(request):
    """The kernels, with the threads of a block in this order, or compiled where there is a GPU."""
    return GpuKernels() if request.param == "gpu" else emulated(request.param == "reverse")


def emulated(reverse):
    return EmulatedKernels(*(build.emulated(op) for op in build.OPS), reverse=reverse)


def rotation_of(op, hidden, num_coordinates, generator):
    if op == "dense_hash":
        return torch.randn(hidden, num_coordinates + 2, generator=generator)
    size = padded_size(hidden)
    shape = (-(-num_coordinates // size), 3, size)
    return torch.randint(0, 2, shape, generator=generator) * 2.0 - 1


def check(kernels, op, rows, rotation, num_coordinates, block_size):
    """The kernel gives every row the key that the reference gives it."""
    name = str(rows.dtype).removeprefix("torch.")
    bits = rows.view(torch.int32 if rows.dtype == torch.float32 else torch.int16).numpy()
    typed = bits.view(ROW_TYPES[name])
    keys = kernels.lsh_hash(op, typed, name, rotation.numpy(), num_coordinates, block_size)
    expected = REFERENCES[op](rows, rotation, num_coordinates, block_size).numpy()
    wrong = np.flatnonzero(keys != expected)
    assert not len(wrong), f"{len(wrong)} of {len(rows)} keys, the first of row {wrong[0]}"


@each_op
@each_dtype
@pytest.mark.parametrize("hidden", [1, 2, 3, 4, 8, 31, 96, 128, 129, 500, 1024, 2049])
def test_same_keys_as_the_reference(kernels, op, hidden, dtype):
    generator = torch.Generator().manual_seed(hidden)
    rows = torch.randn(9, hidden, generator=generator).to(dtype)
    for num_coordinates, block_size in ((1, 1), (33, 5), (64, 64), (96, 16), (300, 37)):
        rotation = rotation_of(op, hidden, num_coordinates, generator)
        check(kernels, op, rows, rotation, num_coordinates, block_size)


@each_op
@settings(max_examples=30, deadline=None)
@given(
    hidden=st.integers(1, 300),
    num_rows=st.integers(0, 20),
    num_coordinates=st.integers(1, 300),
    block_size=st.integers(1, 400),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_layouts(kernels, op, hidden, num_rows, num_coordinates, block_size, dtype, seed):
    """Small integers, so that coordinates are often of the same magnitude."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-2, 3, (num_rows, hidden), generator=generator).to(dtype)
    rotation = rotation_of(op, hidden, num_coordinates, generator).sign()
    check(kernels, op, rows, rotation, num_coordinates, block_size)


@each_op
@each_dtype
def test_special_rows(kernels, op, dtype):
    rows = torch.randn(10, 40, generator=torch.Generator().manual_seed(0))
    rows[0], rows[1], rows[2] = 0.0, -0.0, 1.0
    rows[3] *= 1e-42
    for row, value in ((5, torch.nan), (6, torch.inf), (7, -torch.inf), (8, 3e38)):
        rows[row, row] = value
    rotation = rotation_of(op, 40, 96, torch.Generator().manual_seed(1))
    check(kernels, op, rows.to(dtype), rotation, 96, 16)


@pytest.mark.parametrize(("hidden", "num_coordinates"), [(16384, 96), (9000, 16384), (64, 16384)])
def test_as_many_coordinates_as_shared_memory_takes(kernels, hidden, num_coordinates):
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(2, hidden, generator=generator)
    rotation = rotation_of("hadamard_hash", hidden, num_coordinates, generator)
    check(kernels, "hadamard_hash", rows, rotation, num_coordinates, 16)
    if hidden == 64:
        rotation = rotation_of("dense_hash", hidden, num_coordinates, generator)
        check(kernels, "dense_hash", rows, rotation, num_coordinates, 16)


@each_op
def test_refuses_more(op):
    rows = np.zeros((1, 16385 if op == "hadamard_hash" else 1), np.uint32)
    rotation = np.ones((1, 3, 32768) if op == "hadamard_hash" else (1, 16385), np.float32)
    with pytest.raises(RuntimeError, match="CUDA error"):
        emulated(reverse=False).lsh_hash(op, rows, "float32", rotation, 16385, 16)
