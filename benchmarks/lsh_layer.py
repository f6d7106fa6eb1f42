"""One layer's work with LSH clustering, for bench_lsh.py: what is added, and the experts.

Shapes: N rows of one rank, grouped by expert; C clusters; H columns; E experts; F of the FFN.
"""

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import gelu, linear, silu
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_moe_comp.compression.clustering import (
    Clusters,
    Groups,
    centered,
    cluster,
    refined,
    shuffled,
)
from megatron_moe_comp.compression.hash_families import LshHash
from megatron_moe_comp.compression.random_stream import RandomStream, random_words
from megatron_moe_comp.mcore.clustering_state import LshState, Measurement
from megatron_moe_comp.options.config import CompressionConfig

NUM_EXPERTS, TOP_K = 8, 2
FFN_FACTORS = {"gelu": 4.0, "swiglu": 2.75}
"""F / H of each kind of expert."""
RANDOM = RandomStream(key=1, offset=2, stream=3)
CONTROLLER_ITERATIONS = 30


@dataclass(frozen=True)
class Batch:
    """One rank's rows of one micro-batch, what restoring needs, and the gradients that arrive."""

    groups: Groups
    rows: torch.Tensor
    """[N, H]."""
    probs: torch.Tensor
    """[N]."""
    grads: torch.Tensor
    """[N, H]."""


@dataclass(frozen=True)
class Case:
    """One way to cluster a batch."""

    family: str
    variant: str
    impl: str
    config: CompressionConfig
    hash: LshHash
    num_coordinates: int
    clusters: Clusters


class References(TorchDispatchMode):
    """Context in which the ops of clustering, their gradients too, are their references."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:  # noqa: ANN001, ANN401
        hashes, clusters = (
            sys.modules[f"megatron_moe_comp.ops.{name}"] for name in ("lsh_hash", "cluster_sum")
        )
        references = {
            "hadamard_hash": hashes._hadamard_reference,
            "dense_hash": hashes._dense_reference,
            "cluster_sum": clusters._sum_reference,
            "cluster_broadcast": clusters._broadcast_reference,
        }
        namespace, name = func._schema.name.split("::")
        function = references[name] if namespace == "megatron_moe_comp" else func
        return function(*args, **(kwargs or {}))


class Stopwatch:
    """Seconds of each stage since the one before."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self.laps: dict[str, float] = {}
        self._last = self._now()

    def _now(self) -> float:
        if not self._is_cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def lap(self, stage: str) -> None:
        """Ends a stage."""
        now = self._now()
        self.laps[stage] = now - self._last
        self._last = self._now()


def make_batch(num_tokens: int, hidden: int, dtype: torch.dtype, device: str) -> Batch:
    """Returns rows with a common mean, around centres of Zipf frequencies for each expert."""
    generator = torch.Generator().manual_seed(0)
    num_rows = TOP_K * num_tokens

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    experts = torch.randint(NUM_EXPERTS, (num_rows,), generator=generator).sort().values
    num_centres = -(-num_rows // (4 * NUM_EXPERTS))
    frequencies = 1.0 / torch.arange(1, num_centres + 1)
    which = torch.multinomial(frequencies, num_rows, replacement=True, generator=generator)
    centres = normal(NUM_EXPERTS * num_centres, hidden)[experts * num_centres + which]
    rows = normal(hidden) + centres + 0.3 * normal(num_rows, hidden)
    probs = torch.rand(num_rows, generator=generator)

    def on_device(values: torch.Tensor) -> torch.Tensor:
        return values.to(device, dtype)

    return Batch(
        Groups(
            experts.bincount(minlength=NUM_EXPERTS).to(device),
            [True] * NUM_EXPERTS,
            num_rows,
        ),
        on_device(rows).requires_grad_(),
        on_device(probs).requires_grad_(),
        on_device(normal(num_rows, hidden)),
    )


def at_rate(config: CompressionConfig, hash_: LshHash, batch: Batch) -> tuple[int, Clusters]:
    """Returns coordinates and clusters next to the target rate, of those the controller tries."""
    state, tried = LshState.initial(config), {}
    for iteration in range(CONTROLLER_ITERATIONS):
        number = state.num_coordinates
        if number not in tried:
            tried[number] = make_clusters(config, hash_, number, batch)
        seen = Measurement(batch.groups.total, len(tried[number]))
        state.update(seen, iteration, config)
    target = config.moe_lsh_target_rate * batch.groups.total
    return min(tried.items(), key=lambda item: abs(len(item[1]) - target))


@torch.no_grad()
def make_clusters(
    config: CompressionConfig,
    hash_: LshHash,
    num_coordinates: int,
    batch: Batch,
    watch: Stopwatch | None = None,
) -> Clusters:
    """Returns the clusters that the dispatcher would make of the rows; times its stages."""
    rows, groups = batch.rows, batch.groups
    hashed = centered(rows, groups) if config.moe_lsh_center else rows
    keys = hash_.keys(hashed, num_coordinates)
    if config.moe_lsh_hash == "random":
        keys = shuffled(keys, groups, random_words(RANDOM, len(rows), rows.device))
    if watch:
        watch.lap("hash")
    clusters = cluster(keys, groups)
    for _ in range(config.moe_lsh_refine):
        clusters = refined(clusters, rows, groups)
    if watch:
        watch.lap("cluster")
    return clusters


def run_case(case: Case, batch: Batch) -> dict[str, float]:
    """Returns the seconds of each stage of what clustering adds, forward and backward."""
    rows, probs = batch.rows, batch.probs
    outputs = torch.ones_like(rows[: len(case.clusters)]).requires_grad_()
    centroid_grads = torch.ones_like(outputs)
    with References() if case.impl == "reference" else nullcontext():
        watch = Stopwatch(rows.device)
        clusters = make_clusters(case.config, case.hash, case.num_coordinates, batch, watch)
        centroids = clusters.mean(rows)
        watch.lap("mean")
        restored = clusters.broadcast(outputs)
        if case.config.moe_lsh_residual == "identity":
            restored = restored + (rows - clusters.broadcast(centroids))
        restored = restored * probs[:, None]
        watch.lap("restore")
        torch.autograd.grad(
            (centroids, restored), (rows, outputs, probs), (centroid_grads, batch.grads)
        )
        watch.lap("backward")
    return watch.laps


def make_experts(kind: str, rows: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns both matrices of each expert, [F or 2F, H] and [H, F]."""
    hidden = rows.shape[1]
    ffn = round(FFN_FACTORS[kind] * hidden)

    def matrix(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(*shape, device=rows.device)).to(rows.dtype).requires_grad_()

    return [
        (matrix((1 + (kind == "swiglu")) * ffn, hidden), matrix(hidden, ffn))
        for _ in range(NUM_EXPERTS)
    ]


def run_experts(
    kind: str,
    experts: Sequence[tuple[torch.Tensor, torch.Tensor]],
    rows: torch.Tensor,
    probs: torch.Tensor,
    sizes: Sequence[int],
) -> float:
    """Returns the seconds of experts, forward and backward, on as many rows each as `sizes`.

    As Megatron's, they multiply what is between their matrices by the probabilities.
    """

    def split(values: torch.Tensor) -> list[torch.Tensor]:
        parts = values.detach()[: sum(sizes)].split(list(sizes))
        return [part.requires_grad_(values.requires_grad) for part in parts]

    parts = list(zip(split(rows), split(probs), experts, strict=True))
    watch = Stopwatch(rows.device)
    for part, factors, (first, second) in parts:
        inner = linear(part, first)
        if kind == "swiglu":
            gate, value = inner.chunk(2, dim=1)
            inner = silu(gate) * value
        else:
            inner = gelu(inner)
        output = linear(inner * factors[:, None], second)
        inputs = (part, first, second, *([factors] if factors.requires_grad else []))
        torch.autograd.grad(output, inputs, output.detach())
    watch.lap("experts")
    return watch.laps["experts"]
