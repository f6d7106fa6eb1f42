"""The launchers of kernels/cuda/cluster_sum.cu, called through ctypes; a few cases of their own."""

import ctypes
import hashlib
from pathlib import Path

import numpy as np

from tests.cuda_emulation.kernels import ROW_TYPES, launch


class _ClusterCall(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("num_clusters", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("row_type", ctypes.c_int32),
        ("mean", ctypes.c_bool),
    )


class EmulatedClusters:
    """Both ops of `build.emulated`; each writes into the rows or the values."""

    def __init__(self, library: Path, reverse: bool = False):
        self._library = ctypes.CDLL(str(library))
        self.reverse = reverse

    def cluster_sum(
        self,
        rows: np.ndarray,
        values: np.ndarray,
        row_type: str,
        order: np.ndarray,
        offsets: np.ndarray,
        mean: bool,
    ) -> None:
        """Writes into the values; rows and values are arrays of the bits of their numbers."""
        call = _call(rows, values, row_type, order, offsets, mean)
        launch(self._library, "moe_comp_cluster_sum", self.reverse, call)

    def cluster_broadcast(
        self,
        rows: np.ndarray,
        values: np.ndarray,
        row_type: str,
        order: np.ndarray,
        offsets: np.ndarray,
        mean: bool,
    ) -> None:
        """Writes into the rows; rows and values are arrays of the bits of their numbers."""
        call = _call(rows, values, row_type, order, offsets, mean)
        launch(self._library, "moe_comp_cluster_broadcast", self.reverse, call)


def _call(rows, values, row_type, order, offsets, mean):
    assert rows.dtype == values.dtype == ROW_TYPES[row_type]
    assert order.dtype == offsets.dtype == np.int64
    assert rows.flags.c_contiguous
    assert values.flags.c_contiguous
    assert rows.shape == (len(order), values.shape[1])
    assert len(values) == len(offsets) - 1
    return _ClusterCall(
        rows.ctypes.data,
        values.ctypes.data,
        order.ctypes.data,
        offsets.ctypes.data,
        len(values),
        rows.shape[1],
        list(ROW_TYPES).index(row_type),
        mean,
    )


def digest(kernels: EmulatedClusters) -> str:
    """Returns the digest of what both ops write in cases that take every path through them."""
    digest = hashlib.sha256()
    generator = np.random.default_rng(0)
    counts = (0, 1, 9, 0, 4, 5, 0)
    offsets = np.cumsum((0, *counts))
    order = generator.permutation(offsets[-1])
    for row_type, bits in ROW_TYPES.items():
        for hidden, skip in ((64, 0), (64, 1), (13, 0)):
            rows = generator.standard_normal((len(order), hidden))
            if row_type == "bfloat16":
                rows = (rows.astype(np.float32).view(np.uint32) >> 16).astype(bits)
            else:
                rows = rows.astype(row_type).view(bits)
            # Rows that begin `skip` values behind an aligned address.
            rows = np.concatenate((rows.ravel()[:skip], rows.ravel()))[skip:].reshape(rows.shape)
            for mean in (False, True):
                values = np.full((len(counts), hidden), 7, bits)
                kernels.cluster_sum(rows, values, row_type, order, offsets, mean)
                spread = np.full_like(rows, 7)
                kernels.cluster_broadcast(spread, values, row_type, order, offsets, mean)
                digest.update(values.tobytes() + spread.tobytes())
    return digest.hexdigest()
