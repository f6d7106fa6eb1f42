"""The launchers of kernels/cuda, called through ctypes on NumPy arrays."""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROW_TYPES = {
    "float32": np.uint32,
    "bfloat16": np.uint16,
    "float16": np.uint16,
    "float64": np.uint64,  # of clusters alone
}
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


class _RandomStream(ctypes.Structure):
    _fields_ = (
        ("key", ctypes.c_uint64),
        ("offset", ctypes.c_uint32),
        ("stream", ctypes.c_uint32),
    )


class EmulatedKernels:
    """Both ops of `build.emulated`; arguments as in megatron_moe_comp.ops."""

    def __init__(self, quantize_pack: Path, unpack_dequantize: Path, reverse: bool = False):
        self._quantize = ctypes.CDLL(str(quantize_pack))
        self._dequantize = ctypes.CDLL(str(unpack_dequantize))
        self.reverse = reverse

    def quantize_pack(
        self,
        rows: np.ndarray,
        row_type: str,
        row_scales: np.ndarray | None,
        message: np.ndarray,
        segments: Sequence[int],
        random: tuple[int, int, int],
        mid_rise: bool = False,
    ) -> None:
        """Writes into the message; `random` is key, offset and stream."""
        call = _call(rows, row_type, row_scales, message, segments)
        words = ctypes.byref(_RandomStream(*random)), ctypes.c_bool(mid_rise)
        launch(self._quantize, "moe_comp_quantize_pack", self.reverse, call, *words)

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
        launch(self._dequantize, "moe_comp_unpack_dequantize", self.reverse, call)


class EmulatedDithering:
    """unpack_dithered of `build.emulated`; arguments as in megatron_moe_comp.ops."""

    def __init__(self, library: Path, reverse: bool = False):
        self._library = ctypes.CDLL(str(library))
        self.reverse = reverse

    def unpack_dithered(
        self,
        message: np.ndarray,
        rows: np.ndarray,
        row_type: str,
        segments: Sequence[int],
        senders: Sequence[int],
        random: tuple[int, int],
    ) -> None:
        """Writes into the rows; `random` is offset and stream."""
        call = _call(rows, row_type, None, message, segments)
        table = (ctypes.c_int64 * len(senders))(*senders)
        words = map(ctypes.c_uint32, random)
        launch(self._library, "moe_comp_unpack_dithered", self.reverse, call, table, *words)


class EmulatedGaussian:
    """gaussian_pack and gaussian_unpack of `build.emulated`."""

    def __init__(self, library: Path, reverse: bool = False):
        self._library = ctypes.CDLL(str(library))
        self.reverse = reverse

    def gaussian_pack(
        self, rows: np.ndarray, row_type: str, message: np.ndarray, segments: Sequence[int]
    ) -> None:
        """Writes into the message."""
        call = _call(rows, row_type, None, message, segments)
        launch(self._library, "moe_comp_gaussian_pack", self.reverse, call)

    def gaussian_unpack(
        self, message: np.ndarray, rows: np.ndarray, row_type: str, segments: Sequence[int]
    ) -> None:
        """Writes into the rows."""
        call = _call(rows, row_type, None, message, segments)
        launch(self._library, "moe_comp_gaussian_unpack", self.reverse, call)


def launch(
    library: ctypes.CDLL, function: str, reverse: bool, call: ctypes.Structure, *arguments: object
) -> None:
    """Calls a launcher of an emulated library, with threads in the given order."""
    library.emulation_reverse(reverse)
    if code := getattr(library, function)(ctypes.byref(call), *arguments, None):
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
