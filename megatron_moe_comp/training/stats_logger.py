"""StatsLogger: gathers CommStats of all layers and ranks, and brings them where the user looks."""

import json
import math
import time
from argparse import Namespace
from collections.abc import Callable
from datetime import UTC, datetime
from functools import wraps
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.training.models.gpt import GPTModelConfig
from megatron.training.utils import is_rank0

from megatron_moe_comp import ops
from megatron_moe_comp.comm.all_to_all import sum_over_ranks
from megatron_moe_comp.compression.codecs import CODECS
from megatron_moe_comp.compression.random_stream import TrainingStep
from megatron_moe_comp.compression.wires import WIRES
from megatron_moe_comp.mcore.dispatchers.compressed import SAMPLE_INTERVAL
from megatron_moe_comp.mcore.moe_layer import CompressedMoELayer
from megatron_moe_comp.options.config import CompressionConfig
from megatron_moe_comp.stats.comm_stats import Column, summarize
from megatron_moe_comp.stats.phase_times import PHASES
from megatron_moe_comp.stats.text import MEGABYTE, describe, interval_line, print_summary
from megatron_moe_comp.training.hooks import after_gradients
from megatron_moe_comp.training.log_outputs import (
    require_writable,
    write_file,
    write_histogram,
    write_panels,
    write_scalars,
)

PREFIX = "moe-a2a/"
PANELS = {
    "MB per iteration": ["wire-MB", "float32-MB"],
    "SQNR (dB)": ["sqnr-db-.*"],
    "ms per iteration": ["phase-ms-.*"],
    "most loaded rank (bytes)": ["most-loaded-rank-.*"],
    "most loaded node (bytes)": ["most-loaded-node-.*"],
}

Record = dict[str, Any]


class StatsLogger:
    """Reports the statistics of all MoE layers of all ranks.

    Each log interval has a record, which is a line of --moe-a2a-stats-jsonl: {"time", "setting",
    "ranks", "iteration", "train_iters", "seconds_per_iteration", "loss", "phase_seconds": {phase:
    seconds} or None} and the report of `comm_stats.summarize` but for its layers, whose bytes are
    per iteration here. Seconds of phases are means over ranks, of one iteration in ten. SQNR is
    that of the last measurement. When training ends in order, the last record is written again with
    {"ended": True}, or one of the iterations since.

    Args:
        compression: the options in use.
        step: returns the current training step.
        args: Megatron's, for the log interval and the number of iterations.
        decision: what auto chose and why, if the method is its choice.
    """

    def __init__(
        self,
        compression: CompressionConfig,
        step: Callable[[], TrainingStep],
        args: Namespace,
        decision: dict[str, Any] | None = None,
    ) -> None:
        self._compression = compression
        self._decision = decision
        self._step = step
        self._args = args
        self._layers: list[CompressedMoELayer] = []
        self._layer_names: list[str] = []
        self._loss = torch.zeros(2, dtype=torch.float64)
        """The sum of the losses of this rank's tokens since the last record, and their number."""
        self._is_timed = False
        self._timed_iterations = 0
        self._iteration = 0
        self._last: Record | None = None
        self._logged: dict[str, torch.Tensor] = {}
        self._logged_iteration: int | None = None
        self._clock: tuple[int, float] | None = None
        self._sqnr_db: dict[str, float | None] = {}

    def attach(self, model_config: GPTModelConfig, layer_names: list[str]) -> None:
        """Hooks into the building of the model and the end of every backward pass.

        Args:
            model_config: changed in place.
            layer_names: what to call the layers; MoE layers are numbered in this order, from 1.

        Raises:
            ValueError: rank 0 cannot write a file of statistics.
        """
        if is_rank0():
            kernels = _kernels(self._compression)
            chosen = describe(self._compression)
            if self._decision is not None:
                chosen = f"auto: {chosen}, {self._decision['reason']}"
            print(f"all-to-all {chosen}; kernels: {kernels}", flush=True)
            for kind in ("json", "jsonl"):
                if path := getattr(self._compression, f"moe_a2a_stats_{kind}"):
                    require_writable(f"--moe-a2a-stats-{kind}", path)
        self._layer_names = layer_names
        model_config.post_wrap_hooks.append(self._collect_layers)
        after_gradients(model_config.transformer, self._end_iteration)

    def watched(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a forward step whose "lm loss", of training, is in the records."""

        @wraps(forward_step)
        def step(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            output, loss_function = forward_step(*args, **kwargs)

            def watched_loss(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
                result = loss_function(*args, **kwargs)
                if torch.is_grad_enabled():
                    self._add_loss(result)
                return result

            return output, watched_loss

        return step

    def _add_loss(self, result: Any) -> None:  # noqa: ANN401
        """Adds what a loss function of Megatron's returns; other scripts' may return otherwise."""
        report = result[-1] if isinstance(result, tuple) else None
        sums = report.get("lm loss") if isinstance(report, dict) else None
        if isinstance(sums, torch.Tensor) and sums.numel() == 2:
            self._loss = self._loss.to(sums.device) + sums.detach().view(2)

    def _collect_layers(self, models: list[MegatronModule]) -> list[MegatronModule]:
        modules = (module for model in models for module in model.modules())
        self._layers = [m for m in modules if isinstance(m, CompressedMoELayer) and m.stats]
        return models

    def _end_iteration(self) -> None:
        """Writes the record of the interval, if one ends here."""
        self._iteration = self._step().iteration + 1
        self._timed_iterations += self._is_timed
        if self._clock is None:
            self._logged_iteration = self._iteration - 1
            self._clock = self._iteration, time.monotonic()
        is_due = self._iteration % self._args.log_interval == 0
        if is_due and self._iteration > self._logged_iteration:
            self._log_interval()
        # The first iteration of a process is never timed.
        self._is_timed = self._iteration % SAMPLE_INTERVAL == 0
        for layer in self._layers:
            if self._is_timed:
                layer.stats.phases.start()
            else:
                layer.stats.phases.on = False

    def _sums(self) -> dict[str, torch.Tensor]:
        """Returns sums over ranks: a collective.

        layers: CommStats' counters since the start, [layers, wires, columns]; phases: seconds of
        each, since then, too; ranks; loss: see `_loss`.
        """
        layers = torch.zeros(len(self._layer_names), len(WIRES), len(Column), dtype=torch.float64)
        phases = torch.zeros(len(PHASES), dtype=torch.float64)
        for layer in self._layers:
            layers[layer.layer_number - 1] += layer.stats.totals()
            phases += torch.tensor(list(layer.stats.phases.seconds().values()))
        own = {"layers": layers, "phases": phases, "ranks": torch.ones(1), "loss": self._loss.cpu()}
        summed = sum_over_ranks(torch.cat([values.double().flatten() for values in own.values()]))
        parts = summed.split([values.numel() for values in own.values()])
        return {name: p.view_as(own[name]) for name, p in zip(own, parts, strict=True)}

    def _log_interval(self) -> None:
        is_first, iteration = self._last is None, self._iteration
        record = self._last = self._record()
        if is_rank0() and record["ratio_fp32"] is not None:
            print(interval_line(record), flush=True)
        self._write_line(record)
        if record["ratio_fp32"] is not None:
            if is_first:
                panels = {title: [PREFIX + n for n in names] for title, names in PANELS.items()}
                write_panels("Expert all-to-all", panels)
            scalars = {PREFIX + name: value for name, value in scalars_of(record).items()}
            write_scalars(scalars, iteration)
            write_histogram(f"{PREFIX}bits", record["rows_of_bits"] or {}, iteration)

    def _write_line(self, record: Record) -> None:
        path = self._compression.moe_a2a_stats_jsonl
        if is_rank0() and path:
            write_file("--moe-a2a-stats-jsonl", path, json.dumps(record) + "\n", "a")

    def _record(self) -> Record:
        """Returns the figures since the last record."""
        sums, now, iteration = self._sums(), time.monotonic(), self._iteration
        iterations = iteration - self._logged_iteration
        loss, tokens = sums.pop("loss").tolist()
        self._loss.zero_()
        new = {name: values - self._logged.get(name, 0) for name, values in sums.items()}
        ranks = int(sums["ranks"])
        report = summarize(new["layers"].sum(dim=0)[None], {0: "all"}, self._compression)
        del report["layers"]
        for wire in WIRES:
            of_wire = report["wires"][wire]
            for key in ("raw_bytes", "wire_bytes"):
                of_wire[key] /= iterations
            if of_wire["sqnr_db"] is None:
                of_wire["sqnr_db"] = self._sqnr_db.get(wire)
            self._sqnr_db[wire] = of_wire["sqnr_db"]
        since, begun = self._clock
        record = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "setting": describe(self._compression),
            "ranks": ranks,
            "iteration": iteration,
            "train_iters": self._args.train_iters,
            "seconds_per_iteration": (now - begun) / (iteration - since)
            if iteration > since
            else None,
            "loss": loss / tokens if tokens and math.isfinite(loss) else None,
            "raw_bytes": sum(wire["raw_bytes"] for wire in report["wires"].values()),
            "wire_bytes": sum(wire["wire_bytes"] for wire in report["wires"].values()),
            "phase_seconds": self._phase_seconds(new["phases"] / ranks),
        }
        self._logged, self._logged_iteration, self._clock = sums, iteration, (iteration, now)
        return record | report

    def _phase_seconds(self, seconds: torch.Tensor) -> dict[str, float] | None:
        """Returns the mean per timed iteration of a rank's seconds in each phase; None of none."""
        if not self._timed_iterations:
            return None
        mean = (seconds / self._timed_iterations).tolist()
        self._timed_iterations = 0
        return dict(zip(PHASES, mean, strict=True))

    def finish(self) -> None:
        """Prints the summary and writes the JSON file; every rank must call it, after training."""
        totals = self._sums()["layers"]
        moe_layers = [i for i, layer in enumerate(totals) if layer.any()]
        names = {i + 1: self._layer_names[i] for i in moe_layers}
        report = summarize(totals[moe_layers], names, self._compression)
        report["auto"] = self._decision
        if self._logged_iteration not in (None, self._iteration):
            self._last = self._record()
        if self._last is not None:
            self._write_line(self._last | {"ended": True})
        if is_rank0():
            print_summary(report, self._compression)
            if path := self._compression.moe_a2a_stats_json:
                write_file("--moe-a2a-stats-json", path, json.dumps(report, indent=2) + "\n", "w")


def scalars_of(record: Record) -> dict[str, float]:
    """Returns the figures of a record that TensorBoard and W&B draw as lines, by name."""
    scalars = {
        "wire-MB": record["wire_bytes"] / MEGABYTE,
        "float32-MB": record["raw_bytes"] / MEGABYTE,
        "ratio-fp32": record["ratio_fp32"],
        "mean-bits": record["mean_bits"],
    }
    scalars |= {f"sqnr-db-{wire}": r["sqnr_db"] for wire, r in record["wires"].items()}
    for phase, seconds in (record["phase_seconds"] or {}).items():
        scalars[f"phase-ms-{phase}"] = 1e3 * seconds
    for group in ("most_loaded_rank", "most_loaded_node", "lsh"):
        scalars |= {f"{group}_{name}": value for name, value in (record[group] or {}).items()}
    return {name.replace("_", "-"): v for name, v in scalars.items() if v is not None}


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
