"""The launchers of kernels/cuda, called through ctypes on NumPy arrays."""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROW_TYPES = {"float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16}
"""The order of RowType in launchers.h; rows are arrays of the bits of their values."""


class _OpCall(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("hidden", ctypes.c_int64),
        ("row_scales", ctypes.c_void_p),
        ("message", ctypes.c_void_p),
        ("segments", ctypes.POINTER(ctypes.c_int64)),
        ("num_segments", ctypes.c_int64),
        ("row_type", ctypes.c_int32),
    )


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


class _RandomStream(ctypes.Structure):
    _fields_ = (
        ("key", ctypes.c_uint64),
        ("offset", ctypes.c_uint32),
        ("stream", ctypes.c_uint32),
    )


class EmulatedKernels:
    """All of `build.OPS`, emulated; arguments as in megatron_moe_comp.ops."""

    def __init__(
        self, quantize_pack: Path, unpack_dequantize: Path, lsh_hash: Path, reverse: bool = False
    ):
        self._quantize = ctypes.CDLL(str(quantize_pack))
        self._dequantize = ctypes.CDLL(str(unpack_dequantize))
        self._hash = ctypes.CDLL(str(lsh_hash))
        self.reverse = reverse

    def quantize_pack(
        self,
        rows: np.ndarray,
        row_type: str,
        row_scales: np.ndarray | None,
        message: np.ndarray,
        segments: Sequence[int],
        random: tuple[int, int, int],
    ) -> None:
        """Writes into the message; `random` is key, offset and stream."""
        call = _call(rows, row_type, row_scales, message, segments)
        function = self._quantize.moe_comp_quantize_pack
        self._launch(self._quantize, function, call, ctypes.byref(_RandomStream(*random)))

    def unpack_dequantize(
        self,
        message: np.ndarray,
        row_scales: np.ndarray | None,
        rows: np.ndarray,
        row_type: str,
        segments: Sequence[int],
    ) -> None:
        """Writes into the rows."""
        call = _call(rows, row_type, row_scales, message, segments)
        self._launch(self._dequantize, self._dequantize.moe_comp_unpack_dequantize, call)

    def lsh_hash(
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
        self._launch(self._hash, getattr(self._hash, f"moe_comp_{op}"), call)
        return keys

    def _launch(self, library, function, call, *arguments) -> None:
        library.emulation_reverse(self.reverse)
        if code := function(ctypes.byref(call), *arguments, None):
            library.emulation_error.restype = ctypes.c_char_p
            raise RuntimeError(f"CUDA error {code}: {library.emulation_error().decode()}")


def _call(rows, row_type, row_scales, message, segments):
    assert rows.dtype == ROW_TYPES[row_type]
    assert rows.flags.c_contiguous
    assert message.dtype == np.uint8
    assert row_scales is None or row_scales.dtype == np.float32
    return _OpCall(
        rows.ctypes.data,
        rows.shape[1],
        None if row_scales is None else row_scales.ctypes.data,
        message.ctypes.data,
        (ctypes.c_int64 * len(segments))(*segments),
        len(segments) // 5,
        list(ROW_TYPES).index(row_type),
    )
