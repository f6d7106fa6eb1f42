"""measure_machine(): what this machine achieves, from a short run with a model's own sizes."""

from collections.abc import Iterable
from itertools import pairwise

import torch

from megatron_moe_comp.comm.all_to_all import nodes_of_ranks
from megatron_moe_comp.comm.link_timing import (
    Group,
    best_seconds,
    exchange_seconds,
    rank_in,
    slowest_times,
)
from megatron_moe_comp.compression.codecs import CODECS
from megatron_moe_comp.compression.packet import Packet, Peer
from megatron_moe_comp.compression.random_stream import RandomStream
from megatron_moe_comp.options.codec_options import BITS_RANGE
from megatron_moe_comp.plan.cost_model import CodecSpeed, Link, Machine
from megatron_moe_comp.plan.methods import stock_method
from megatron_moe_comp.plan.operations import tokens_per_rank
from megatron_moe_comp.plan.shape import Layout, Model

MAX_MESSAGE_BYTES = 64 << 20
MAX_GEMM_OPERATIONS = {"cpu": 2e9, "cuda": 2e12}
SMALL = 16
"""How many times smaller the second size is, that tells a speed and a fixed time apart."""
REPEATS = 3
CODEC_BITS = 6
RANDOM = RandomStream(key=1, offset=2, stream=3)


def measure_machine(
    model: Model, layout: Layout, group: Group, device: torch.device, codecs: Iterable[str]
) -> Machine:
    """Returns what the slowest of all processes achieves; a collective of all of them.

    Takes about a second, or a few exchanges of the model's own messages where these take longer.

    Args:
        model: whose rows, messages and experts are tried.
        layout: which ranks are on one node.
        group: the expert-parallel group that this process belongs to.
        device: of the model.
        codecs: names of the codecs to time.
    """
    sizes = _message_sizes(model, layout)
    values = {"large": _codec_rows(model, layout) * model.hidden_size}
    values["small"] = max(1, _codec_rows(model, layout) // SMALL) * model.hidden_size
    times: dict[str, float] = {}
    for kind, per_peer in sizes.items():
        for size, num_bytes in (("large", per_peer), ("small", _smaller(per_peer))):
            times[f"{kind} {size}"] = _link_seconds(kind, num_bytes, layout, group, device)
    names = list(codecs)
    for name in names:
        for size, number in values.items():
            encode, decode = _codec_seconds(name, number, model, layout, device)
            times[f"{name} encode {size}"], times[f"{name} decode {size}"] = encode, decode
    operations, times["gemm"] = _gemm(model, layout, device)
    copied, times["copy"] = _copy(values["large"], model, device)
    times = slowest_times(times)
    links = {kind: _link(kind, per_peer, times, layout) for kind, per_peer in sizes.items()}
    return Machine(
        flops=operations / times["gemm"],
        memory_bandwidth=copied / times["copy"],
        near=links.get("near", Link(float("inf"))),
        far=links.get("far", Link(float("inf"))),
        codecs={name: _codec_speed(name, times, values) for name in names},
    )


def _message_sizes(model: Model, layout: Layout) -> dict[str, int]:
    """Returns the bytes that an uncompressed message has for each near and each far rank."""
    wires = [traffic.wires[0] for traffic in stock_method(model, layout).traffic]
    largest = max(wires, key=lambda wire: wire.near_bytes + wire.far_bytes)
    total = largest.near_bytes + largest.far_bytes
    part = min(1.0, MAX_MESSAGE_BYTES / max(1.0, total))
    return {
        kind: max(SMALL, int(part * num_bytes / peers))
        for kind, peers, num_bytes in (
            ("near", layout.near_peers, largest.near_bytes),
            ("far", layout.far_peers, largest.far_bytes),
        )
        if peers
    }


def _smaller(num_bytes: int) -> int:
    return max(1, num_bytes // SMALL)


def _link_seconds(
    kind: str, num_bytes: int, layout: Layout, group: Group, device: torch.device
) -> float:
    """Returns the time of an exchange with the near or the far ranks of the group alone."""
    nodes, own = nodes_of_ranks(group, layout.ranks_per_node), rank_in(group)

    def bytes_to(rank: int) -> int:
        is_near = nodes[rank] == nodes[own]
        return num_bytes if rank != own and is_near == (kind == "near") else 0

    return exchange_seconds(group, bytes_to, device)


def _link(kind: str, per_peer: int, times: dict[str, float], layout: Layout) -> Link:
    peers = layout.near_peers if kind == "near" else layout.far_peers
    large, small = per_peer * peers, _smaller(per_peer) * peers
    speed, fixed = _speed(large, times[f"{kind} large"], small, times[f"{kind} small"])
    return Link(speed, fixed / peers)


def _codec_speed(name: str, times: dict[str, float], values: dict[str, int]) -> CodecSpeed:
    (encode, encode_fixed), (decode, decode_fixed) = (
        _speed(values["large"], times[f"{what} large"], values["small"], times[f"{what} small"])
        for what in (f"{name} encode", f"{name} decode")
    )
    return CodecSpeed(encode, decode, (encode_fixed + decode_fixed) / 2)


def _speed(large: float, large_s: float, small: float, small_s: float) -> tuple[float, float]:
    """Returns the amount per second and the fixed seconds that explain two measurements."""
    if large == small or large_s <= small_s:
        return large / large_s, 0.0
    speed = (large - small) / (large_s - small_s)
    fixed = small_s - small / speed
    return (speed, fixed) if fixed > 0 else (large / large_s, 0.0)


def _codec_rows(model: Model, layout: Layout) -> int:
    """Returns how many rows are tried: those of a message, within limits."""
    stack = max(model.stacks, key=lambda stack: stack.seq_length)
    rows = tokens_per_rank(model, layout, stack) * model.topk
    limit = MAX_MESSAGE_BYTES // (model.hidden_size * model.value_bytes)
    return max(SMALL, min(int(rows), limit))


def _codec_seconds(
    name: str, values: int, model: Model, layout: Layout, device: torch.device
) -> tuple[float, float]:
    """Returns the times of encoding and decoding a message of so many values."""
    num_rows = values // model.hidden_size
    rows = torch.randn(
        num_rows,
        model.hidden_size,
        dtype=getattr(torch, model.dtype),
        device=device,
        generator=torch.Generator(device).manual_seed(0),
    )
    codec, others = CODECS[name](), layout.near_peers + layout.far_peers
    counts = [num_rows * i // others for i in range(others + 1)]
    num_bits = min(CODEC_BITS, BITS_RANGE.get(name, (0, CODEC_BITS))[1])
    peers = [Peer(0, 0, codec)]
    peers += [Peer(b - a, num_bits, codec) for a, b in pairwise(counts)]
    packet = Packet.plan(peers, 0, rows)
    message = packet.encode(rows, (), RANDOM)
    return (
        best_seconds(lambda: packet.encode(rows, (), RANDOM), device, REPEATS),
        best_seconds(lambda: packet.decode(message, rows, (), RANDOM), device, REPEATS),
    )


def _gemm(model: Model, layout: Layout, device: torch.device) -> tuple[float, float]:
    """Returns the operations and the time of an expert's first matrix on its rows."""
    stack = max(model.stacks, key=lambda stack: stack.seq_length)
    rows = tokens_per_rank(model, layout, stack) * model.topk * layout.expert_parallel
    columns = model.moe_ffn_hidden_size
    per_row = 2.0 * model.hidden_size * columns
    limit = MAX_GEMM_OPERATIONS[device.type] / per_row
    num_rows = max(1, int(min(rows / model.num_experts, limit)))
    dtype = getattr(torch, model.dtype)
    a = torch.ones(num_rows, model.hidden_size, dtype=dtype, device=device)
    b = torch.ones(model.hidden_size, columns, dtype=dtype, device=device)
    return num_rows * per_row, best_seconds(lambda: a @ b, device, REPEATS)


def _copy(values: int, model: Model, device: torch.device) -> tuple[int, float]:
    """Returns the bytes read and written, and the time, of a copy."""
    source = torch.ones(values, dtype=getattr(torch, model.dtype), device=device)
    target = torch.empty_like(source)
    seconds = best_seconds(lambda: target.copy_(source), device, REPEATS)
    return 2 * values * model.value_bytes, seconds
