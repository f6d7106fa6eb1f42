"""CommStats: what one layer's all-to-alls cost before and after compression, and their error."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_moe_comp.config import WIRES, CompressionConfig, Wire

RAW, WIRE, SIGNAL, NOISE = range(4)
"""Columns of a totals tensor: bytes as float32, bytes handed to the collective, and the sums of
squares of the sampled rows and of their errors."""

NUM_COLUMNS = 4


class CommStats:
    """Counters of one layer on one rank; the dispatcher owns them and the collective fills them.

    Only rows that leave their rank count, and only in training. Raw bytes are those of float32
    values.
    """

    def __init__(self) -> None:
        self._bytes = {wire: [0, 0] for wire in WIRES}
        self._rows = {wire: [0, 0] for wire in WIRES}
        self._error: dict[Wire, torch.Tensor] = {}
        self.counting = True
        """False in evaluation, whose traffic would blur the figures per iteration."""

    def add_bytes(self, wire: Wire, raw_bytes: int, wire_bytes: int) -> None:
        """Counts one message: its size as float32 values and as handed to the collective."""
        if self.counting:
            self._bytes[wire][RAW] += raw_bytes
            self._bytes[wire][WIRE] += wire_bytes

    def add_rows(self, wire: Wire, pairs: int, rows: int) -> None:
        """Counts the (token, expert) pairs of one message and the rows that carry them."""
        if self.counting:
            self._rows[wire][0] += pairs
            self._rows[wire][1] += rows

    def add_error(self, wire: Wire, rows: torch.Tensor, decoded: torch.Tensor) -> None:
        """Adds the signal and the error of some rows, without synchronising with the device.

        Args:
            wire: the wire that the rows were sent on.
            rows: [N, H] as they were.
            decoded: [N, H] as they arrive.
        """
        x = rows.float()
        sums = torch.stack((x.square().sum(), (x - decoded.float()).square().sum())).double()
        self._error[wire] = self._error[wire] + sums if wire in self._error else sums

    def totals(self) -> torch.Tensor:
        """Returns all counters since the start, float64 [wires, columns] on the CPU."""
        totals = torch.zeros(len(WIRES), NUM_COLUMNS, dtype=torch.float64)
        for i, wire in enumerate(WIRES):
            totals[i, :2] = torch.tensor(self._bytes[wire], dtype=torch.float64)
            if wire in self._error:
                totals[i, 2:] = self._error[wire].cpu()
        return totals


def summarize(
    totals: torch.Tensor, layer_numbers: Sequence[int], config: CompressionConfig
) -> dict[str, Any]:
    """Returns the totals as the report that --moe-a2a-stats-json writes.

    Args:
        totals: float64 [layers, wires, columns], summed over ranks.
        layer_numbers: Megatron's number (from 1) of each of the layers.
        config: the method in use.

    Returns:
        {"method", "bits", "ratio_fp32", "ratio_bf16", "wires": {wire: {"raw_bytes", "wire_bytes",
        "sqnr_db"}}, "layers": [{"layer", "ratio_fp32", "wires"}]}. Bytes are of all ranks; a ratio
        is None where nothing crossed a wire, sqnr_db where nothing was sampled or lossless.
    """
    overall = totals.sum(dim=0)
    ratio = _ratio(overall)
    return {
        "method": config.moe_a2a_compress,
        "bits": config.moe_a2a_bits if config.enabled else None,
        "ratio_fp32": ratio,
        "ratio_bf16": None if ratio is None else ratio / 2,
        "wires": _wires(overall),
        "layers": [
            {"layer": number, "ratio_fp32": _ratio(layer), "wires": _wires(layer)}
            for number, layer in zip(layer_numbers, totals, strict=True)
        ],
    }


def sqnr_db(signal: float, noise: float) -> float | None:
    """Returns the signal-to-quantization-noise ratio in dB; None without signal or noise."""
    if not (signal > 0 and noise > 0):
        return None
    return 10 * math.log10(signal / noise)


def _wires(totals: torch.Tensor) -> Mapping[str, Mapping[str, Any]]:
    return {
        wire: {
            "raw_bytes": int(row[RAW]),
            "wire_bytes": int(row[WIRE]),
            "sqnr_db": sqnr_db(row[SIGNAL].item(), row[NOISE].item()),
        }
        for wire, row in zip(WIRES, totals, strict=True)
    }


def _ratio(totals: torch.Tensor) -> float | None:
    raw, wire = totals[:, RAW].sum().item(), totals[:, WIRE].sum().item()
    return raw / wire if wire else None
