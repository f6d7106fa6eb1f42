"""What the user sees of CommStats: a line per log interval, TensorBoard, W&B, table and JSON."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.module import MegatronModule
from megatron.training import print_rank_0
from megatron.training.models.gpt import GPTModelConfig
from megatron.training.utils import is_rank0
from rich.console import Console
from rich.table import Table

from megatron_moe_comp import ops
from megatron_moe_comp.comm.all_to_all import sum_over_ranks
from megatron_moe_comp.comm_stats import Column, summarize
from megatron_moe_comp.compression.codecs import CODECS
from megatron_moe_comp.compression.random_stream import TrainingStep
from megatron_moe_comp.config import WIRES, CompressionConfig
from megatron_moe_comp.mcore.log_outputs import require_writable, write_scalars
from megatron_moe_comp.mcore.moe_layer import CompressedMoELayer

MEGABYTE = 1e6


class StatsLogger:
    """Reports the statistics of all MoE layers of all ranks.

    Args:
        compression: the options in use.
        step: returns the current training step.
        log_interval: iterations from line to line.
        decision: what auto chose and why, if the method is its choice.
    """

    def __init__(
        self,
        compression: CompressionConfig,
        step: Callable[[], TrainingStep],
        log_interval: int,
        decision: dict[str, Any] | None = None,
    ) -> None:
        self._compression = compression
        self._decision = decision
        self._step = step
        self._log_interval = log_interval
        self._layers: list[CompressedMoELayer] = []
        self._layer_names: list[str] = []
        self._logged = torch.zeros(0)
        self._logged_iteration: int | None = None
        self._sqnr_db: dict[str, float] = {}

    def attach(self, model_config: GPTModelConfig, layer_names: list[str]) -> None:
        """Hooks into the building of the model and the end of every backward pass.

        Args:
            model_config: changed in place.
            layer_names: what to call the layers; MoE layers are numbered in this order, from 1.

        Raises:
            ValueError: rank 0 cannot write the JSON file.
        """
        if is_rank0():
            kernels = _kernels(self._compression)
            chosen = describe(self._compression)
            if self._decision is not None:
                chosen = f"auto: {chosen}, {self._decision['reason']}"
            print(f"all-to-all {chosen}; kernels: {kernels}", flush=True)
            if self._compression.moe_a2a_stats_json:
                require_writable("--moe-a2a-stats-json", self._compression.moe_a2a_stats_json)
        self._layer_names = layer_names
        self._logged = torch.zeros(len(WIRES), len(Column), dtype=torch.float64)
        model_config.post_wrap_hooks.append(self._collect_layers)
        model_config.transformer.finalize_model_grads_func = self._finalize_model_grads

    def _collect_layers(self, models: list[MegatronModule]) -> list[MegatronModule]:
        modules = (module for model in models for module in model.modules())
        self._layers = [m for m in modules if isinstance(m, CompressedMoELayer) and m.stats]
        return models

    def _finalize_model_grads(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Megatron's own, then the line of the interval.

        Every rank comes here once per iteration with no pipeline message pending, so summing over
        ranks cannot deadlock.
        """
        finalize_model_grads(*args, **kwargs)
        iteration = self._step().iteration + 1
        if self._logged_iteration is None:
            self._logged_iteration = iteration - 1
        if iteration % self._log_interval == 0 and iteration > self._logged_iteration:
            self._log_interval_line(iteration)

    def _totals(self) -> torch.Tensor:
        """Returns the counters of all layers, summed over ranks: [layers, wires, columns]."""
        totals = torch.zeros(len(self._layer_names), len(WIRES), len(Column), dtype=torch.float64)
        for layer in self._layers:
            totals[layer.layer_number - 1] += layer.stats.totals()
        return sum_over_ranks(totals)

    def _log_interval_line(self, iteration: int) -> None:
        totals = self._totals().sum(dim=0)
        report = summarize((totals - self._logged)[None], {0: "all"}, self._compression)
        iterations = iteration - self._logged_iteration
        self._logged, self._logged_iteration = totals, iteration
        if report["ratio_fp32"] is None:
            return
        raw, sent = (
            sum(wire[key] for wire in report["wires"].values()) / iterations
            for key in ("raw_bytes", "wire_bytes")
        )
        # An interval without a sample repeats the last measurement.
        self._sqnr_db |= {w: r["sqnr_db"] for w, r in report["wires"].items() if r["sqnr_db"]}
        lsh = report["lsh"]
        sqnr = "".join(f" {wire} {value:.1f}" for wire, value in self._sqnr_db.items())
        print_rank_0(
            f" all-to-all {describe(self._compression)} | iteration {iteration:8d} | "
            f"MB per iteration: {sent / MEGABYTE:.3f} of {raw / MEGABYTE:.3f} as float32 "
            f"({report['ratio_fp32']:.2f}x) |"
            + (f" LSH rate {lsh['rate']:.3f} |" if lsh and lsh["rows"] else "")
            + (f" SQNR (dB):{sqnr} |" if sqnr else "")
        )
        scalars = {"wire-MB": sent / MEGABYTE, "ratio-fp32": report["ratio_fp32"]}
        scalars |= {f"sqnr-db-{wire}": value for wire, value in self._sqnr_db.items()}
        if lsh:
            scalars |= {f"lsh-{name.replace('_', '-')}": v for name, v in lsh.items() if v}
        if report["mean_bits"] is not None:
            scalars["mean-bits"] = report["mean_bits"]
        if report["most_loaded_rank"] is not None:
            scalars |= {
                f"most-loaded-rank-{name.replace('_', '-')}": value
                for name, value in report["most_loaded_rank"].items()
            }
        write_scalars({f"moe-a2a/{name}": value for name, value in scalars.items()}, iteration)

    def finish(self) -> None:
        """Prints the summary and writes the JSON file; every rank must call it, after training."""
        totals = self._totals()
        moe_layers = [i for i, layer in enumerate(totals) if layer.any()]
        names = {i + 1: self._layer_names[i] for i in moe_layers}
        report = summarize(totals[moe_layers], names, self._compression)
        report["auto"] = self._decision
        if is_rank0():
            _print_summary(report, self._compression)
            if self._compression.moe_a2a_stats_json:
                text = json.dumps(report, indent=2) + "\n"
                Path(self._compression.moe_a2a_stats_json).write_text(text)


def _kernels(compression: CompressionConfig) -> str:
    """Returns what clusters, encodes and decodes on this machine."""
    if not compression.enabled:
        return "none"
    used = ["hadamard_hash", "cluster_sum"] if compression.moe_a2a_compress == "lsh" else []
    for codec in (compression.forward.codec, compression.backward.codec):
        used += CODECS[codec].kernels
    if not used:
        return "PyTorch"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compiled = all(ops.is_compiled(device, op) for op in used)
    return "compiled" if compiled else "reference (PyTorch)"


def describe(compression: CompressionConfig) -> str:
    """Returns the method, its bits and what else changes the traffic, in a few words."""
    if not compression.enabled:
        return "none"
    words = [compression.moe_a2a_compress]
    if compression.moe_a2a_codec is not None:
        words.append(compression.moe_a2a_codec)
    if compression.moe_a2a_bits is not None:
        words.append(f"{compression.moe_a2a_bits} bit")
        if compression.backward != compression.forward:
            words.append(f"({compression.backward.codec} {compression.backward.bits} bit backward)")
        if compression.moe_a2a_bit_policy != "uniform":
            words.append(compression.moe_a2a_bit_policy)
    if compression.moe_a2a_scope != "remote":
        words.append(compression.moe_a2a_scope)
    if compression.moe_a2a_dedup:
        words.append("dedup")
    return " ".join(words)


def _print_summary(report: dict[str, Any], compression: CompressionConfig) -> None:
    if report["ratio_fp32"] is None:
        print("Expert all-to-all: nothing crossed a wire in training.", flush=True)
        return
    table = Table(title=f"Expert all-to-all, {describe(compression)}, training, all ranks")
    table.add_column("wire / layer")
    for column in ("as float32 (MB)", "sent (MB)", "ratio", "SQNR (dB)"):
        table.add_column(column, justify="right")
    rows = list(report["wires"].items())
    rows += [(layer["name"], _sum_wires(layer["wires"])) for layer in report["layers"]]
    rows.append(("all", _sum_wires(report["wires"])))
    for name, wire in rows:
        raw, sent, sqnr = wire["raw_bytes"], wire["wire_bytes"], wire["sqnr_db"]
        table.add_row(
            name,
            f"{raw / MEGABYTE:.2f}",
            f"{sent / MEGABYTE:.2f}",
            f"{raw / sent:.2f}x" if sent else "",
            f"{sqnr:.1f}" if sqnr is not None else "",
            end_section=name in (WIRES[-1], report["layers"][-1]["name"]),
        )
    Console(width=100).print(table)
    if report["most_loaded_rank"] is not None:
        raw, uniform, sent = (value / 1e3 for value in report["most_loaded_rank"].values())
        print(
            f"Most loaded rank, per layer and micro-batch: {raw:.1f} kB as float32, {uniform:.1f} "
            f"kB with the same bits for all, {sent:.1f} kB as sent."
        )
    lsh = report["lsh"]
    if lsh and lsh["rows"]:
        residual = lsh["residual_norm"]  # None if no iteration was sampled
        print(
            f"Clustering: {lsh['centroids']} centroids for {lsh['rows']} rows, rate "
            f"{lsh['rate']:.3f}; {lsh['expert_flops_saved']:.3g} expert FLOPs saved"
            + ("." if residual is None else f"; residual {residual:.2f} of a row's norm.")
        )
    if report["mean_bits"] is not None:
        print(f"Mean bits per value: {report['mean_bits']:.2f}.")
    if compression.moe_a2a_dedup:
        saved = 1 - report["rows"] / report["pairs"]
        print(f"Rows shared by several experts of one rank: {saved:.1%} fewer rows sent.")
    print(
        f"Total compression {report['ratio_fp32']:.2f}x against float32, "
        f"{report['ratio_bf16']:.2f}x against bfloat16, over all four wires, scales and "
        "probabilities included.",
        flush=True,
    )


def _sum_wires(wires: dict[str, dict[str, Any]]) -> dict[str, Any]:
    total = {key: sum(w[key] for w in wires.values()) for key in ("raw_bytes", "wire_bytes")}
    return total | {"sqnr_db": None}
