"""The launchers of kernels/cuda/lsh_hash.cu, called through ctypes; a few cases of their own."""

import ctypes
import hashlib
from pathlib import Path

import numpy as np

from tests.cuda_emulation.kernels import ROW_TYPES, launch


class _HashCall(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("rotation", ctypes.c_void_p),
        ("columns", ctypes.c_int64),
        ("num_coordinates", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("keys", ctypes.c_void_p),
        ("row_type", ctypes.c_int32),
    )


class EmulatedHashes:
    """Both ops of `build.emulated`; rows are arrays of the bits of their values."""

    def __init__(self, library: Path, reverse: bool = False):
        self._library = ctypes.CDLL(str(library))
        self.reverse = reverse

    def hash(
        self,
        op: str,
        rows: np.ndarray,
        row_type: str,
        rotation: np.ndarray,
        num_coordinates: int,
        block_size: int,
    ) -> np.ndarray:
        """Returns the keys; `op` is hadamard_hash or dense_hash."""
        assert rows.dtype == ROW_TYPES[row_type]
        assert rotation.dtype == np.float32
        assert rows.flags.c_contiguous
        assert rotation.flags.c_contiguous
        keys = np.full(len(rows), -1, np.int64)
        call = _HashCall(
            rows.ctypes.data,
            *rows.shape,
            rotation.ctypes.data,
            rotation.shape[-1],
            num_coordinates,
            block_size,
            keys.ctypes.data,
            list(ROW_TYPES).index(row_type),
        )
        launch(self._library, f"moe_comp_{op}", self.reverse, call)
        return keys


def digest(kernels: EmulatedHashes) -> str:
    """Returns the digest of the keys in cases that take every path through both kernels."""
    digest = hashlib.sha256()
    for op, row_type, num_rows, hidden, num_coordinates, block_size in (
        ("hadamard_hash", "bfloat16", 9, 257, 96, 16),
        ("hadamard_hash", "float16", 3, 13, 40, 7),
        ("hadamard_hash", "float32", 2, 1030, 2049, 70),
        ("hadamard_hash", "float32", 5, 1, 3, 1),
        ("dense_hash", "bfloat16", 9, 130, 40, 16),
        ("dense_hash", "float32", 3, 7, 300, 1),
    ):
        generator = np.random.default_rng(hidden)
        values = generator.integers(-4, 5, (num_rows, hidden)).astype(np.float32)  # with ties
        values[1, hidden // 2] = np.inf
        rows = values.view(np.uint32)
        if row_type == "bfloat16":
            rows = (rows >> 16).astype(np.uint16)
        elif row_type == "float16":
            rows = values.astype(np.float16).view(np.uint16)
        shape = (hidden, num_coordinates + 1)
        if op == "hadamard_hash":
            size = 1 << (hidden - 1).bit_length()
            shape = (-(-num_coordinates // size), 3, size)
        rotation = generator.choice(np.float32([-1, 1]), shape)
        keys = kernels.hash(op, rows, row_type, rotation, num_coordinates, block_size)
        digest.update(keys.tobytes())
    return digest.hexdigest()
