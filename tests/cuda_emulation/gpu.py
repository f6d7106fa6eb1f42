"""The compiled CUDA kernels on a GPU, called like the emulated ones."""

from collections.abc import Sequence

import numpy as np
import torch

from megatron_moe_comp import ops


class GpuKernels:
    """Both ops on copies of NumPy arrays, which lie as far from an aligned address as those do."""

    def __init__(self, device: str = "cuda"):
        assert ops.is_compiled(device), "the CUDA kernels are not built: run scripts/setup.sh"
        self._device = device

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
        written = self._copy(message, torch.uint8)
        torch.ops.megatron_moe_comp.quantize_pack(
            self._copy(rows, getattr(torch, row_type)),
            None if row_scales is None else self._copy(row_scales, torch.float32),
            written,
            segments,
            *random,
            mid_rise,
        )
        message[:] = written.cpu().numpy()

    def unpack_dequantize(
        self,
        message: np.ndarray,
        row_scales: np.ndarray | None,
        rows: np.ndarray,
        row_type: str,
        segments: Sequence[int],
    ) -> None:
        """Writes into the rows."""
        written = self._copy(rows, getattr(torch, row_type))
        torch.ops.megatron_moe_comp.unpack_dequantize(
            self._copy(message, torch.uint8),
            None if row_scales is None else self._copy(row_scales, torch.float32),
            written,
            segments,
        )
        rows[:] = written.view(torch.int16 if rows.itemsize == 2 else torch.int32).cpu().numpy()

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
        written = self._copy(rows, getattr(torch, row_type))
        torch.ops.megatron_moe_comp.unpack_dithered(
            self._copy(message, torch.uint8), written, segments, senders, *random
        )
        rows[:] = written.view(torch.int16 if rows.itemsize == 2 else torch.int32).cpu().numpy()

    def gaussian_pack(
        self, rows: np.ndarray, row_type: str, message: np.ndarray, segments: Sequence[int]
    ) -> None:
        """Writes into the message."""
        written = self._copy(message, torch.uint8)
        source = self._copy(rows, getattr(torch, row_type))
        torch.ops.megatron_moe_comp.gaussian_pack(source, written, segments)
        message[:] = written.cpu().numpy()

    def gaussian_unpack(
        self, message: np.ndarray, rows: np.ndarray, row_type: str, segments: Sequence[int]
    ) -> None:
        """Writes into the rows."""
        written = self._copy(rows, getattr(torch, row_type))
        source = self._copy(message, torch.uint8)
        torch.ops.megatron_moe_comp.gaussian_unpack(source, written, segments)
        rows[:] = written.view(torch.int16 if rows.itemsize == 2 else torch.int32).cpu().numpy()

    def _copy(self, array, dtype):
        skip = array.ctypes.data % 16
        memory = torch.empty(skip + array.nbytes, dtype=torch.uint8, device=self._device)[skip:]
        memory.copy_(torch.from_numpy(array.reshape(-1).view(np.uint8)))
        return memory.view(dtype).view(array.shape)


class GpuClusters(GpuKernels):
    """Both ops on clusters; each writes into the rows or the values, like `EmulatedClusters`."""

    def cluster_sum(
        self,
        rows: np.ndarray,
        values: np.ndarray,
        row_type: str,
        order: np.ndarray,
        offsets: np.ndarray,
        mean: bool,
    ) -> None:
        """Writes into the values."""
        self._call(
            torch.ops.megatron_moe_comp.cluster_sum, rows, values, row_type, order, offsets, mean
        )

    def cluster_broadcast(
        self,
        rows: np.ndarray,
        values: np.ndarray,
        row_type: str,
        order: np.ndarray,
        offsets: np.ndarray,
        mean: bool,
    ) -> None:
        """Writes into the rows."""
        self._call(
            torch.ops.megatron_moe_comp.cluster_broadcast,
            values,
            rows,
            row_type,
            order,
            offsets,
            mean,
        )

    def _call(self, op, source, target, row_type, order, offsets, mean):
        indices = (self._copy(array, torch.int64) for array in (order, offsets))
        written = op(self._copy(source, getattr(torch, row_type)), *indices, mean)
        target[:] = written.cpu().contiguous().view(torch.uint8).numpy().view(target.dtype)


class GpuHashes(GpuKernels):
    """Both hashes, like `EmulatedHashes`."""

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
        keys = getattr(torch.ops.megatron_moe_comp, op)(
            self._copy(rows, getattr(torch, row_type)),
            self._copy(rotation, torch.float32),
            num_coordinates,
            block_size,
        )
        return keys.cpu().numpy()
