"""The all-to-all of the experts: compressed_all_to_all() encodes, exchanges and decodes rows.

Shapes: N rows sent, M rows received, H columns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_comp.comm.exchange import Arrival, exchange
from megatron_moe_comp.comm.routes import Route
from megatron_moe_comp.compression.codec import Codec
from megatron_moe_comp.compression.codecs.identity import Identity
from megatron_moe_comp.compression.packet import Exact, Packet, Peer
from megatron_moe_comp.compression.random_stream import RandomStream
from megatron_moe_comp.compression.wires import Wire
from megatron_moe_comp.stats.comm_stats import CommStats

_IDENTITY = Identity()


@dataclass(frozen=True)
class Message:
    """How one wire of one pass is encoded: its name, codec and random numbers."""

    wire: Wire
    codec: Codec
    random: RandomStream
    num_pieces: int = 1
    """Pieces that are encoded, sent and decoded one after the other, overlapping."""
    measure_error: bool = False
    """Whether the sender decodes its own message to add its error to the statistics."""


def global_rank() -> int:
    """Returns this process's rank among all processes of the run."""
    return dist.get_rank()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Returns the sum of a CPU tensor over all processes of the run, on the CPU; a collective."""
    total = values.to("cuda" if "nccl" in dist.get_backend() else "cpu", copy=True)
    dist.all_reduce(total)
    return total.cpu()


def gather_over_ranks[T](value: T) -> list[T]:
    """Returns every process's picklable value, in the order of ranks; a collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def nodes_of_ranks(group: dist.ProcessGroup, ranks_per_node: int) -> tuple[int, ...]:
    """Returns the node of every rank of the group.

    Args:
        group: process group.
        ranks_per_node: consecutive ranks of the run that share a node.
    """
    return tuple(rank // ranks_per_node for rank in dist.get_process_group_ranks(group))


def compressed_all_to_all(
    rows: torch.Tensor,
    probs: torch.Tensor | None,
    masks: torch.Tensor | None,
    routes: tuple[Route, Route],
    messages: tuple[Message, Message],
    stats: CommStats,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Returns the rows, probabilities and masks of all ranks for this one, through one wire.

    Each direction is one exchange (or one per piece) that carries encoded rows and what is exact
    together. What stays on the rank is copied, bit for bit. The gradient takes the way back through
    the second message; for the codec it is the straight-through gradient of an unbiased estimate.

    Args:
        rows: [N, H], grouped by destination as the routes say.
        probs: [pairs], sent unchanged in their own dtype, or None.
        masks: uint8 [N, bytes], sent unchanged and without a gradient, or None.
        routes: what each rank sends and receives, with the bits of the forward wire and with those
            of the backward wire; both in the forward direction.
        messages: encoding of the forward and of the backward wire.
        stats: counts both.
    """
    return _CompressedAllToAll.apply(rows, probs, masks, routes, messages, stats)


class _CompressedAllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, probs, masks, routes, messages, stats):  # noqa: ANN001, ANN205
        ctx.route, ctx.message, ctx.stats = routes[1], messages[1], stats
        ctx.has_probs = probs is not None
        arrived = send(rows, probs, masks, routes[0], messages[0], stats)
        if masks is not None:
            ctx.mark_non_differentiable(arrived[2])
        return arrived

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_rows, grad_probs, _):  # noqa: ANN001, ANN205
        back = ctx.route.reversed()
        probs = grad_probs if ctx.has_probs else None
        grads = send(grad_rows, probs, None, back, ctx.message, ctx.stats)
        return grads[0], grads[1], None, None, None, None


def send(
    rows: torch.Tensor,
    probs: torch.Tensor | None,
    masks: torch.Tensor | None,
    route: Route,
    message: Message,
    stats: CommStats,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Returns what `compressed_all_to_all` does, through one message and without a gradient.

    Encodes, exchanges and decodes what leaves the rank; keeps what stays. With several pieces, the
    next is encoded and the previous decoded while one is under way.
    """
    beside = [
        _Beside(values, sent, received, route.rank)
        for values, sent, received in (
            (probs, route.sent.pairs, route.received.pairs),
            (masks, route.sent.rows, route.received.rows),
        )
        if values is not None
    ]
    rows = rows.contiguous()
    arrived_rows = _arrivals(rows, route)
    to_send, to_receive = _peers_to_send(route, message), _peers_to_receive(route, message)
    wire_bytes = 0
    under_way: list[tuple[Packet, Sequence[_Beside], torch.Tensor, Arrival]] = []
    for piece in range(message.num_pieces):
        with_piece = beside if piece == 0 else []
        sending, receiving = (
            Packet.plan(peers, route.rank, rows, exact, piece, message.num_pieces)
            for peers, exact in (
                (to_send, [b.sent for b in with_piece]),
                (to_receive, [b.received for b in with_piece]),
            )
        )
        with stats.timed("encode", rows.device):
            buffer = sending.encode(rows, [b.leaving for b in with_piece], message.random)
        wire_bytes += buffer.numel()
        if message.measure_error:
            _measure_error(sending, rows, buffer, message, stats)
        with stats.timed("transfer", rows.device):
            received, arrival = exchange(
                buffer, sending.layout.byte_splits, receiving.layout.byte_splits, route.group
            )
        under_way.append((receiving, with_piece, received, arrival))
        if len(under_way) > 1:
            _finish(*under_way.pop(0), arrived_rows, message.random, stats)
    _finish(*under_way.pop(), arrived_rows, message.random, stats)
    # Stock Megatron sends a probability with each dispatched row, whether this did or not.
    raw_columns = rows.shape[1] + message.wire.startswith("dispatch")
    _count(route, message, 4 * raw_columns, wire_bytes, stats)
    results = [b.all_arrived() for b in beside]
    return (
        arrived_rows,
        results.pop(0) if probs is not None else None,
        results.pop(0) if masks is not None else None,
    )


def _count(
    route: Route, message: Message, raw_pair_bytes: int, wire_bytes: int, stats: CommStats
) -> None:
    """Counts a message's bytes, its rows and their bits; a pair is `raw_pair_bytes` as float32."""
    pairs = sum(_without_own(route.sent.pairs, route.rank))
    stats.add_bytes(message.wire, raw_bytes=raw_pair_bytes * pairs, wire_bytes=wire_bytes)
    bits = []
    if not isinstance(message.codec, Identity):
        links = zip(route.sent.rows, route.sent.bits, route.plain, strict=True)
        bits = [(rows, num_bits) for rows, num_bits, plain in links if num_bits and not plain]
    num_rows = sum(_without_own(route.sent.rows, route.rank))
    stats.add_rows(message.wire, pairs, num_rows, bits)


def _finish(
    packet: Packet,
    beside: Sequence["_Beside"],
    received: torch.Tensor,
    arrival: Arrival,
    rows: torch.Tensor,
    random: RandomStream,
    stats: CommStats,
) -> None:
    """Waits for one packet and decodes it."""
    with stats.timed("transfer", rows.device):
        arrival.wait()
    with stats.timed("decode", rows.device):
        packet.decode(received, rows, [b.arriving for b in beside], random)


class _Beside:
    """Exact values that travel beside the rows: those leaving, and a place for those arriving."""

    def __init__(
        self, values: torch.Tensor, sent: tuple[int, ...], received: tuple[int, ...], rank: int
    ) -> None:
        item_bytes = math.prod(values.shape[1:]) * values.itemsize
        self.sent = Exact(_without_own(sent, rank), item_bytes)
        self.received = Exact(_without_own(received, rank), item_bytes)
        first = sum(sent[:rank])
        self._own = values[first : first + sent[rank]]
        self._place = sum(received[:rank])
        self.leaving = torch.cat((values[:first], values[first + sent[rank] :]))
        self.arriving = values.new_empty((sum(self.received.splits), *values.shape[1:]))

    def all_arrived(self) -> torch.Tensor:
        """Returns what arrived with the rank's own values in their place."""
        return torch.cat((self.arriving[: self._place], self._own, self.arriving[self._place :]))


def _without_own(splits: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return (*splits[:rank], 0, *splits[rank + 1 :])


def _peers_to_send(route: Route, message: Message) -> list[Peer]:
    own = dist.get_global_rank(route.group, route.rank)
    return [
        Peer(num_rows, num_bits, _IDENTITY if plain else message.codec, own)
        for num_rows, num_bits, plain in zip(
            route.sent.rows, route.sent.bits, route.plain, strict=True
        )
    ]


def _peers_to_receive(route: Route, message: Message) -> list[Peer]:
    d = route.received
    return [
        Peer(num_rows, num_bits, _IDENTITY if plain else message.codec, sender, first_row)
        for num_rows, num_bits, plain, sender, first_row in zip(
            d.rows,
            d.bits,
            route.plain,
            dist.get_process_group_ranks(route.group),
            d.first_rows,
            strict=True,
        )
    ]


def _arrivals(rows: torch.Tensor, route: Route) -> torch.Tensor:
    """Returns a tensor for the rows to be received, [M, H], in which the rank's own already are."""
    arrived = rows.new_empty((sum(route.received.rows), rows.shape[1]))
    first, place = (sum(d.rows[: route.rank]) for d in (route.sent, route.received))
    count = route.sent.rows[route.rank]
    arrived[place : place + count] = rows[first : first + count]
    return arrived


def _measure_error(
    packet: Packet, rows: torch.Tensor, buffer: torch.Tensor, message: Message, stats: CommStats
) -> None:
    """Adds the error of the rows that this packet compresses to the statistics."""
    decoded = torch.empty_like(rows)
    for codec, segments in packet.segments:
        if isinstance(codec, Identity):
            continue
        codec.decode(buffer, segments, decoded, message.random)
        places = [slice(s.first_row, s.first_row + s.num_rows) for s in segments]
        stats.add_error(
            message.wire,
            torch.cat([rows[place] for place in places]),
            torch.cat([decoded[place] for place in places]),
        )
