"""The all-to-all of the experts: exchange() moves bytes, compressed_all_to_all() differentiates.

Only this file talks to torch.distributed in the path of the data. Shapes: N rows sent, M rows
received, H columns.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_moe_comp.comm_stats import CommStats
from megatron_moe_comp.compression.codec import Codec, RowFormat
from megatron_moe_comp.compression.payload import PayloadLayout, Section, as_bytes, from_bytes
from megatron_moe_comp.compression.random_stream import RandomStream
from megatron_moe_comp.config import Wire


@dataclass(frozen=True)
class Message:
    """How one wire of one pass is encoded: its name, codec, bits and random numbers."""

    wire: Wire
    codec: Codec
    num_bits: int
    random: RandomStream
    measure_error: bool = False
    """Whether the sender decodes its own message to add its error to the statistics."""


@dataclass(frozen=True)
class Route:
    """Who exchanges how many rows with whom, seen from one rank of a group."""

    group: dist.ProcessGroup
    rank: int
    """This process's rank in the group."""
    input_splits: tuple[int, ...]
    """Rows sent to each rank."""
    output_splits: tuple[int, ...]
    """Rows received from each rank; its own entry equals that of input_splits."""

    def reversed(self) -> "Route":
        """Returns the way back."""
        return Route(self.group, self.rank, self.output_splits, self.input_splits)


def global_rank() -> int:
    """Returns this process's rank among all processes of the run."""
    return dist.get_rank()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Returns the sum of a CPU tensor over all processes of the run, on the CPU; a collective."""
    total = values.to("cuda" if "nccl" in dist.get_backend() else "cpu", copy=True)
    dist.all_reduce(total)
    return total.cpu()


def exchange(
    buffer: torch.Tensor,
    input_byte_splits: list[int],
    output_byte_splits: list[int],
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Returns the bytes received, uint8 [sum(output_byte_splits)], from one all_to_all_single.

    Args:
        buffer: uint8 [sum(input_byte_splits)].
        input_byte_splits: bytes to each rank of the group.
        output_byte_splits: bytes from each rank of the group.
        group: process group.
    """
    received = buffer.new_empty(sum(output_byte_splits))
    dist.all_to_all_single(received, buffer, output_byte_splits, input_byte_splits, group=group)
    return received


def compressed_all_to_all(
    rows: torch.Tensor,
    probs: torch.Tensor | None,
    route: Route,
    messages: tuple[Message, Message],
    stats: CommStats,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the rows and probabilities of all ranks for this one, through a compressed wire.

    Each direction is one collective that carries encoded rows and exact probabilities together.
    Rows that stay on the rank are copied, bit for bit. The gradient takes the way back through the
    second message; for the codec it is the straight-through gradient of an unbiased estimate.

    Args:
        rows: [N, H], grouped by destination as `route` says.
        probs: [N], sent unchanged in their own dtype, or None.
        route: rows per destination and source.
        messages: encoding of the forward and of the backward wire.
        stats: counts both.
    """
    return _CompressedAllToAll.apply(rows, probs, route, messages, stats)


class _CompressedAllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, probs, route, messages, stats):  # noqa: ANN001, ANN205
        ctx.route, ctx.message, ctx.stats = route, messages[1], stats
        ctx.has_probs = probs is not None
        return _send(rows, probs, route, messages[0], stats)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_rows, grad_probs):  # noqa: ANN001, ANN205
        back = ctx.route.reversed()
        grads = _send(
            grad_rows, grad_probs if ctx.has_probs else None, back, ctx.message, ctx.stats
        )
        return *grads, None, None, None


def _send(
    rows: torch.Tensor,
    probs: torch.Tensor | None,
    route: Route,
    message: Message,
    stats: CommStats,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Encodes, exchanges and decodes the rows that leave the rank; keeps those that stay."""
    codec, row_format = message.codec, RowFormat(rows.shape[1], rows.dtype, message.num_bits)
    sent_rows = _without_own(route.input_splits, route.rank)
    received_rows = _without_own(route.output_splits, route.rank)
    sections = codec.sections(row_format)
    if probs is not None:
        sections += (Section("probs", row_bytes=probs.dtype.itemsize),)
    sending = PayloadLayout(sections, sent_rows)
    receiving = PayloadLayout(sections, received_rows)

    remote = _remote(rows, route)
    parts = codec.encode(remote, sent_rows, row_format, message.random)
    if message.measure_error:
        stats.add_error(message.wire, remote, codec.decode(parts, sent_rows, row_format))
    if probs is not None:
        parts += (as_bytes(_remote(probs, route)),)
    buffer = sending.pack(parts)
    stats.add_bytes(
        message.wire,
        raw_bytes=4 * (remote.numel() + (len(remote) if probs is not None else 0)),
        wire_bytes=buffer.numel(),
    )
    received = exchange(buffer, sending.byte_splits(), receiving.byte_splits(), route.group)

    received_parts = receiving.unpack(received)
    new_probs = None
    if probs is not None:
        arrived = from_bytes(received_parts.pop(), probs.dtype).view(-1)
        new_probs = _with_own(arrived, probs, route)
    arrived = codec.decode(received_parts, received_rows, row_format)
    return _with_own(arrived, rows, route), new_probs


def _without_own(splits: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return (*splits[:rank], 0, *splits[rank + 1 :])


def _remote(values: torch.Tensor, route: Route) -> torch.Tensor:
    """Returns the values [N] or [N, H] that leave the rank, in order."""
    first = sum(route.input_splits[: route.rank])
    after = first + route.input_splits[route.rank]
    return torch.cat((values[:first], values[after:]))


def _with_own(arrived: torch.Tensor, values: torch.Tensor, route: Route) -> torch.Tensor:
    """Returns what arrived with the rank's own values put in their place."""
    first = sum(route.input_splits[: route.rank])
    own = values[first : first + route.input_splits[route.rank]]
    place = sum(route.output_splits[: route.rank])
    return torch.cat((arrived[:place], own, arrived[place:]))
