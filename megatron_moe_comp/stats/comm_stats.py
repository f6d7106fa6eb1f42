"""CommStats: what one layer's all-to-alls cost before and after compression, and their error."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import IntEnum
from typing import Any

import torch

from megatron_moe_comp.compression.wires import WIRES, Wire
from megatron_moe_comp.options.config import CompressionConfig
from megatron_moe_comp.stats.phase_times import Phase, PhaseTimes


class Column(IntEnum):
    """What a totals tensor holds for each wire; used by name, so the order does not matter."""

    RAW = 0
    """Bytes as float32 values, one row for each (token, expert) pair."""
    WIRE = 1
    """Bytes handed to the collective."""
    SIGNAL = 2
    """Sum of squares of the sampled rows."""
    NOISE = 3
    """Sum of squares of their errors."""
    PAIRS = 4
    """(token, expert) pairs."""
    ROWS = 5
    """Rows that carried them."""
    ROWS_2_BITS = 6
    """Those of the rows that were compressed to 2 bits per value."""
    ROWS_3_BITS = 7
    ROWS_4_BITS = 8
    ROWS_5_BITS = 9
    ROWS_6_BITS = 10
    ROWS_7_BITS = 11
    ROWS_8_BITS = 12
    PASSES = 13
    """Passes that the loads are summed over."""
    LOAD_RAW = 14
    """Bytes of the most loaded rank of each pass, as float32."""
    LOAD_UNIFORM = 15
    """The same if all rows had the same bits."""
    LOAD = 16
    """The same as sent."""
    NODE_PASSES = 17
    """Those of the passes whose ranks are on several nodes; the NODE_LOADs are of them."""
    NODE_LOAD_RAW = 18
    """Bytes of the most loaded node of each pass, as float32."""
    NODE_LOAD_UNIFORM = 19
    NODE_LOAD = 20
    CLUSTERED_ROWS = 21
    """Rows that were clustered, those that stay on their rank included; in dispatch_fwd only."""
    CENTROIDS = 22
    """Centroids of them; in dispatch_fwd only."""
    CLUSTERED_SQUARE = 23
    """Sum of squares of the sampled clustered rows; in dispatch_fwd only."""
    RESIDUAL_SQUARE = 24
    """Sum of squares of them less their centroids; in dispatch_fwd only."""
    FLOPS_SAVED = 25
    """Operations that experts did not do for rows that shared a centroid; in dispatch_fwd only."""


ROWS_OF_BITS = {bits: Column[f"ROWS_{bits}_BITS"] for bits in range(2, 9)}
"""The column of the rows of each number of bits per value."""
RANK_LOADS = {
    "float32_bytes": Column.LOAD_RAW,
    "uniform_bytes": Column.LOAD_UNIFORM,
    "bytes": Column.LOAD,
}
"""What is reported of the most loaded rank, and its column."""
NODE_LOADS = {name: Column[f"NODE_{column.name}"] for name, column in RANK_LOADS.items()}
"""The same of the most loaded node."""


class CommStats:
    """Counters of one layer on one rank; the dispatcher owns them and the collective fills them.

    Only rows that leave their rank count, and only in training. Raw bytes are those of float32
    values.
    """

    def __init__(self) -> None:
        self._counts = {wire: [0] * len(Column) for wire in WIRES}
        self._error: dict[Wire, torch.Tensor] = {}
        self._residual: torch.Tensor | None = None
        self.flops_per_row = 0
        """Operations of an expert on one row, forward and backward."""
        self.counting = True
        """False in evaluation, whose traffic would blur the figures per iteration."""
        self.phases = PhaseTimes()

    def timed(self, phase: Phase, device: torch.device) -> AbstractContextManager[None]:
        """Returns a context that counts as `phase` of training, and as nothing in evaluation."""
        return self.phases.timed(phase, device) if self.counting else nullcontext()

    def add_bytes(self, wire: Wire, raw_bytes: int, wire_bytes: int) -> None:
        """Counts one message: its size as float32 values and as handed to the collective."""
        self._add(wire, {Column.RAW: raw_bytes, Column.WIRE: wire_bytes})

    def add_rows(self, wire: Wire, pairs: int, rows: int, bits: Sequence[tuple[int, int]]) -> None:
        """Counts one message's (token, expert) pairs, the rows that carry them, and their bits.

        Args:
            wire: the wire.
            pairs: rows that would be sent if no two experts shared one.
            rows: rows sent.
            bits: (rows, bits per value) of the rows that are compressed to a chosen width.
        """
        self._add(wire, {Column.PAIRS: pairs, Column.ROWS: rows})
        for num_rows, num_bits in bits:
            self._add(wire, {ROWS_OF_BITS[num_bits]: num_rows})

    def add_load(
        self, wire: Wire, of_rank: Sequence[int], of_node: Sequence[int] | None = None
    ) -> None:
        """Counts the bytes of the most loaded rank in one pass, and of the most loaded node.

        Args:
            wire: the wire.
            of_rank: as float32, if all rows had the same bits, and as sent.
            of_node: the same; None if all ranks are on one node.
        """
        for passes, columns, loads in (
            (Column.PASSES, RANK_LOADS, of_rank),
            (Column.NODE_PASSES, NODE_LOADS, of_node),
        ):
            if loads is not None:
                self._add(wire, {passes: 1} | dict(zip(columns.values(), loads, strict=True)))

    def add_clusters(self, rows: int, centroids: int) -> None:
        """Counts rows that were clustered, and their centroids."""
        self._add(
            "dispatch_fwd",
            {
                Column.CLUSTERED_ROWS: rows,
                Column.CENTROIDS: centroids,
                Column.FLOPS_SAVED: (rows - centroids) * self.flops_per_row,
            },
        )

    def _add(self, wire: Wire, counts: dict[int, int]) -> None:
        if self.counting:
            for column, count in counts.items():
                self._counts[wire][column] += count

    def add_error(self, wire: Wire, rows: torch.Tensor, decoded: torch.Tensor) -> None:
        """Adds the signal and the error of some rows, without synchronising with the device.

        Args:
            wire: the wire that the rows were sent on.
            rows: [N, H] as they were.
            decoded: [N, H] as they arrive.
        """
        sums = _squares(rows, decoded)
        self._error[wire] = self._error[wire] + sums if wire in self._error else sums

    def add_residual(self, rows: torch.Tensor, centroids: torch.Tensor) -> None:
        """Adds the squares of some rows [N, H] and of what their centroids [N, H] leave of them."""
        sums = _squares(rows, centroids)
        self._residual = sums if self._residual is None else self._residual + sums

    def totals(self) -> torch.Tensor:
        """Returns all counters since the start, float64 [wires, columns] on the CPU."""
        totals = torch.tensor(list(self._counts.values()), dtype=torch.float64)
        for wire, sums in self._error.items():
            totals[WIRES.index(wire), [Column.SIGNAL, Column.NOISE]] = sums.cpu()
        if self._residual is not None:
            columns = [Column.CLUSTERED_SQUARE, Column.RESIDUAL_SQUARE]
            totals[WIRES.index("dispatch_fwd"), columns] = self._residual.cpu()
        return totals


def _squares(rows: torch.Tensor, approximation: torch.Tensor) -> torch.Tensor:
    """Returns the sums of squares of rows and of their error, float64 [2].

    Zeros where they are not finite: one such sample would make all later figures so.
    """
    x = rows.detach().float()
    sums = torch.stack((x.square().sum(), (x - approximation.float()).square().sum())).double()
    return torch.where(sums.isfinite().all(), sums, 0.0)


def summarize(
    totals: torch.Tensor, layer_names: Mapping[int, str], config: CompressionConfig
) -> dict[str, Any]:
    """Returns the totals as the report that --moe-a2a-stats-json writes.

    Args:
        totals: float64 [layers, wires, columns], summed over ranks.
        layer_names: number (from 1) and name of each of the layers.
        config: the method in use.

    Returns:
        {"method", "bits", "bit_policy", "mean_bits", "rows_of_bits": {bits: rows}, "ratio_fp32",
        "ratio_bf16", "pairs", "rows", "most_loaded_rank": {"float32_bytes", "uniform_bytes",
        "bytes"}, "most_loaded_node": the same, "lsh": {"rows", "centroids", "rate",
        "residual_norm", "expert_flops_saved"}, "wires": {wire: {"raw_bytes", "wire_bytes",
        "sqnr_db"}}, "layers": [{"layer", "name", and what is reported of all}]}. Bytes are of all
        ranks, except those of the most loaded rank, or node: what it sends to others or receives,
        whichever is more, in one layer and micro-batch, over the four wires; of rows alone, without
        probabilities and padding; means over expert-parallel groups, of nodes over those on
        several. A figure is None where nothing crossed a wire; sqnr_db also where nothing was
        sampled or lossless, mean_bits and rows_of_bits where the width is fixed, most_loaded_node
        where expert-parallel ranks share a node, lsh with other methods. Rows of lsh include those
        that stay on their rank; residual_norm is the norm of what centroids leave of rows over that
        of the rows.
    """
    overall = totals.sum(dim=0)
    figures = _figures(overall, config)
    ratio = figures["ratio_fp32"]
    return {
        "method": config.moe_a2a_compress,
        "bits": config.moe_a2a_bits if config.enabled else None,
        "bit_policy": config.moe_a2a_bit_policy if config.enabled else None,
        **figures,
        "ratio_bf16": None if ratio is None else ratio / 2,
        "pairs": int(overall[:, Column.PAIRS].sum()),
        "rows": int(overall[:, Column.ROWS].sum()),
        "layers": [
            {"layer": number, "name": name, **_figures(layer, config)}
            for (number, name), layer in zip(layer_names.items(), totals, strict=True)
        ],
    }


def _figures(totals: torch.Tensor, config: CompressionConfig) -> dict[str, Any]:
    """Returns what is reported of one layer, or of all, from its [wires, columns]."""
    columns = totals.sum(dim=0)
    raw, wire = columns[Column.RAW].item(), columns[Column.WIRE].item()
    has_bits = config.enabled and config.moe_a2a_bits
    rows_of_bits = {bits: int(columns[column]) for bits, column in ROWS_OF_BITS.items()}
    coded_rows = sum(rows_of_bits.values())
    row_bits = sum(bits * rows for bits, rows in rows_of_bits.items())
    return {
        "ratio_fp32": raw / wire if wire else None,
        "mean_bits": row_bits / coded_rows if coded_rows and has_bits else None,
        "rows_of_bits": {bits: rows for bits, rows in rows_of_bits.items() if rows}
        if coded_rows and has_bits
        else None,
        "most_loaded_rank": _load(totals, Column.PASSES, RANK_LOADS),
        "most_loaded_node": _load(totals, Column.NODE_PASSES, NODE_LOADS),
        "lsh": _clusters(columns) if config.moe_a2a_compress == "lsh" else None,
        "wires": _wires(totals),
    }


def _load(
    totals: torch.Tensor, passes: Column, columns: Mapping[str, Column]
) -> dict[str, float] | None:
    """Returns the loads per pass, summed over wires; None without any.

    Args:
        totals: [wires, columns].
        passes: the column of the number of passes.
        columns: what to report, and its column.
    """
    num_passes = totals[:, passes].clamp(min=1)
    load = {name: (totals[:, column] / num_passes).sum() for name, column in columns.items()}
    return {name: value.item() for name, value in load.items()} if any(load.values()) else None


def _clusters(columns: torch.Tensor) -> dict[str, float | int | None]:
    """Returns what is reported of clustering, from the sums [columns] over wires."""
    rows, centroids = columns[Column.CLUSTERED_ROWS].item(), columns[Column.CENTROIDS].item()
    square, residual = columns[Column.CLUSTERED_SQUARE], columns[Column.RESIDUAL_SQUARE]
    return {
        "rows": int(rows),
        "centroids": int(centroids),
        "rate": centroids / rows if rows else None,
        "residual_norm": math.sqrt(residual / square) if square else None,
        "expert_flops_saved": columns[Column.FLOPS_SAVED].item(),
    }


def sqnr_db(signal: float, noise: float) -> float | None:
    """Returns the signal-to-quantization-noise ratio in dB; None without signal or noise."""
    if not (signal > 0 and noise > 0):
        return None
    return 10 * math.log10(signal / noise)


def _wires(totals: torch.Tensor) -> Mapping[str, Mapping[str, Any]]:
    return {
        wire: {
            "raw_bytes": int(row[Column.RAW]),
            "wire_bytes": int(row[Column.WIRE]),
            "sqnr_db": sqnr_db(row[Column.SIGNAL].item(), row[Column.NOISE].item()),
        }
        for wire, row in zip(WIRES, totals, strict=True)
    }
