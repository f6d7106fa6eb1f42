"""What each method sends, from the code that makes its messages, and which one to recommend."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatron_moe_comp.compression.codec import Codec
from megatron_moe_comp.compression.codecs.identity import Identity
from megatron_moe_comp.compression.packet import Exact, Packet, Peer
from megatron_moe_comp.compression.wires import WIRES, Wire
from megatron_moe_comp.options.codec_options import BITS_RANGE, Coding
from megatron_moe_comp.options.config import AUTO_MIN_BITS, CompressionConfig, codec_of
from megatron_moe_comp.options.lsh_options import DEFAULT_RATE
from megatron_moe_comp.plan.cost_model import (
    Machine,
    Method,
    Prediction,
    Traffic,
    WireLoad,
    predict,
)
from megatron_moe_comp.plan.operations import tokens_per_rank
from megatron_moe_comp.plan.shape import Layout, Model, Stack

SAFE_BITS = tuple(range(BITS_RANGE["rq"][1], AUTO_MIN_BITS - 1, -1))
"""Of birdmoe, the most exact first. Fewer, and lsh, change training: see README."""
CLUSTER_BYTES_PER_VALUE = 80
"""Read and written by hashing, means, restoring and their gradients, as float32: 20 passes.
3.7 us per row of 512 values where a pass takes 0.19 us (benchmarks/results/2026-11-22-lsh-cost.md).
"""
DEDUP_BYTES_PER_VALUE = 12
"""Read and written per pair and direction by adding up a row's experts in float32."""
MIN_SPEEDUP = 1.02
"""Less is within what a prediction can tell."""
NEARLY_FASTEST = 1.03
"""A step this much longer than the fastest is worth a method that is more exact."""
LOAD_TO_BALANCE = 1.1


@dataclass(frozen=True)
class _Rows:
    """Rows of a rank to each other, of one wire."""

    per_peer: int
    exact: tuple[int, ...] = ()
    """Bytes of what travels beside them, per peer."""


def stock_method(model: Model, layout: Layout) -> Method:
    """Returns what Megatron's own dispatcher sends: rows, and probabilities in another message."""
    return method_of("none", CompressionConfig(), model, layout)


def method_of(name: str, config: CompressionConfig, model: Model, layout: Layout) -> Method:
    """Returns the Method of a configuration, which is not `auto`."""
    traffic = tuple(_traffic(config, model, layout, stack) for stack in model.stacks)
    codings = (config.forward, config.backward)
    lossy = config.moe_a2a_compress == "lsh" or any(
        0 < coding.bits < AUTO_MIN_BITS or coding.codec in ("terngrad", "topk")
        for coding in codings
    )
    return Method(
        name,
        flags_of(config),
        traffic,
        chunks=config.moe_a2a_chunks if config.enabled else 1,
        expert_rows=_expert_rows(config, layout),
        alters_training=lossy,
    )


def flags_of(config: CompressionConfig) -> tuple[str, ...]:
    """Returns the flags that choose method, codec, bits and rate."""
    names = ["moe_a2a_compress"]
    if config.enabled:
        names += ["moe_a2a_codec", "moe_a2a_backward_codec", "moe_a2a_bits"]
    if config.enabled and config.moe_a2a_bits is not None:
        names += ["moe_a2a_backward_bits", "moe_a2a_bit_policy", "moe_a2a_min_bits"]
    names += ["moe_lsh_target_rate"] if config.moe_a2a_compress == "lsh" else []
    values = {name: getattr(config, name) for name in names}
    return tuple(f"--{n.replace('_', '-')}={v}" for n, v in values.items() if v is not None)


def _traffic(config: CompressionConfig, model: Model, layout: Layout, stack: Stack) -> Traffic:
    pairs = tokens_per_rank(model, layout, stack) * model.topk / layout.expert_parallel
    values = pairs * layout.expert_parallel * model.hidden_size
    wires = tuple(_wire(wire, config, model, layout, pairs) for wire in WIRES)
    if config.moe_a2a_compress == "lsh":
        rows_per_expert = pairs * layout.expert_parallel / model.num_experts
        refine = config.moe_lsh_refine * 2 * values * rows_per_expert * _rate(config)
        return Traffic(wires, CLUSTER_BYTES_PER_VALUE * values, refine)
    if config.enabled and config.moe_a2a_dedup:
        return Traffic(wires, 2 * DEDUP_BYTES_PER_VALUE * values)
    return Traffic(wires)


def _wire(
    wire: Wire, config: CompressionConfig, model: Model, layout: Layout, pairs: float
) -> WireLoad:
    """Returns one wire's load; `pairs` are the (token, expert) pairs of a rank for each rank."""
    is_dispatch = wire.startswith("dispatch")
    recomputed = wire.endswith("fwd") and model.recompute != "none"
    common = {"passes": 2 if recomputed else 1}
    rows = pairs
    masks = None
    if config.moe_a2a_compress == "lsh":
        rows = pairs * _rate(config)
    elif config.enabled and config.moe_a2a_dedup:
        rows = pairs * rows_per_pair(model, layout)
        local = model.num_experts // layout.expert_parallel
        masks = -(-local // 8) if wire == "dispatch_fwd" else None
    prob_bytes = model.prob_bytes if is_dispatch and config.moe_a2a_compress != "lsh" else 0

    def load_of(factor: float, bits: float) -> tuple[float, float]:
        count = round(rows * factor)
        exact = [round(pairs * factor) * prob_bytes] if prob_bytes else []
        exact += [count * masks] if masks else []
        sent = _Rows(count, tuple(exact))
        codecs = _codecs(wire, config)
        # A mean over links of bits that are not whole: some links have one more than others.
        low, high = (
            _message_bytes(sent, b, codecs, model, layout)
            for b in (math.floor(bits), math.ceil(bits))
        )
        part = bits - math.floor(bits)
        return tuple(a + part * (b - a) for a, b in zip(low, high, strict=True))

    coding = config.coding(wire)
    near, far = load_of(layout.load, _bits_of_most_loaded(coding, layout))
    mean_bytes = sum(load_of(1.0, coding.bits))
    if not config.enabled:
        collectives = 2 if is_dispatch else 1
        return WireLoad(near, far, mean_bytes, collectives=collectives, **common)
    peers = layout.far_peers + (layout.near_peers if config.moe_a2a_scope == "remote" else 0)
    values = peers * rows * model.hidden_size
    loads = (1.0, layout.load) if is_dispatch == wire.endswith("fwd") else (layout.load, 1.0)
    codec = coding.codec if wire in config.moe_a2a_wires else "identity"
    encoded, decoded = (values * load for load in loads)
    return WireLoad(near, far, mean_bytes, codec, encoded, decoded, **common)


def _codecs(wire: Wire, config: CompressionConfig) -> tuple[Codec, Codec]:
    """Returns the codecs of rows within a node and between nodes."""
    codec = codec_of(config, wire) if config.enabled else Identity()
    return (codec if config.moe_a2a_scope == "remote" else Identity()), codec


def _message_bytes(
    rows: _Rows, bits: int, codecs: tuple[Codec, Codec], model: Model, layout: Layout
) -> tuple[float, float]:
    """Returns the bytes of a message to the ranks of the node and to the others, as it is sent."""
    near, far = layout.near_peers, layout.far_peers
    # One peer of each kind stands for all.
    peers = [Peer(0, bits, codecs[0]), *(Peer(rows.per_peer, bits, codec) for codec in codecs)]
    exact = [Exact((0, 1, 1), num_bytes) for num_bytes in rows.exact]
    like = torch.empty((0, model.hidden_size), dtype=getattr(torch, model.dtype))
    splits = Packet.plan(peers, 0, like, exact).layout.byte_splits
    return near * splits[1], far * splits[2]


def _bits_of_most_loaded(coding: Coding, layout: Layout) -> float:
    """Returns the mean bits of the most loaded rank's rows: see compression/bit_allocation.py."""
    return min(coding.max_bits, max(coding.min_bits, coding.bits / layout.load))


def _rate(config: CompressionConfig) -> float:
    return config.moe_lsh_target_rate or DEFAULT_RATE


def _expert_rows(config: CompressionConfig, layout: Layout) -> float:
    """Returns the rows that experts compute over those routed to them, forward and backward."""
    if config.moe_a2a_compress != "lsh":
        return 1.0
    clustered = {
        "all": 1.0,
        "remote": (layout.near_peers + layout.far_peers) / layout.expert_parallel,
        "inter-node": layout.far_peers / layout.expert_parallel,
    }[config.moe_lsh_scope]
    return 1 - clustered * (1 - _rate(config))


def rows_per_pair(model: Model, layout: Layout) -> float:
    """Returns the rows that --moe-a2a-dedup sends for each (token, expert) pair.

    With k different experts at random among E, a rank that has L of them gets the row unless none
    of its own is chosen: P (1 - C(E - L, k) / C(E, k)) / k.
    """
    experts, k = model.num_experts, model.topk
    local = experts // layout.expert_parallel
    missed = math.comb(experts - local, k) / math.comb(experts, k)
    return layout.expert_parallel * (1 - missed) / k


def safe_configs(config: CompressionConfig, layout: Layout) -> list[CompressionConfig]:
    """Returns what `auto` and a recommendation choose among, the most exact first."""
    if config.moe_a2a_bits is not None:
        return [config.resolved(config.moe_a2a_bits)]
    found = [config.resolved(bits) for bits in SAFE_BITS]
    if config.moe_a2a_bit_policy is None and layout.load >= LOAD_TO_BALANCE:
        load_aware = replace(config, moe_a2a_bit_policy="optimal")
        found.append(load_aware.resolved(max(SAFE_BITS)))
    return found


@dataclass(frozen=True)
class Choice:
    """What is best, and why."""

    index: int | None
    """Which of the candidates; None: to compress nothing."""
    speedup: float
    """Predicted, over sending rows uncompressed."""


def choose(stock: Prediction, candidates: Sequence[Prediction]) -> Choice:
    """Returns the first, most exact candidate that is nearly the fastest, if any is worth it."""
    fastest = min(candidate.step for candidate in candidates)
    if stock.step < MIN_SPEEDUP * fastest:
        return Choice(None, stock.step / fastest)
    slowest = max(fastest, min(NEARLY_FASTEST * fastest, stock.step / MIN_SPEEDUP))
    index = next(i for i, candidate in enumerate(candidates) if candidate.step <= slowest)
    return Choice(index, stock.step / candidates[index].step)


def predict_all(
    model: Model, layout: Layout, machine: Machine, methods: Sequence[Method]
) -> list[Prediction]:
    """Returns the prediction of each method."""
    return [predict(model, layout, machine, method) for method in methods]
