"""exchange(): the bytes of one all-to-all, under way.

On gloo the exchange posts all receives first, then the sends. In gloo's own all-to-all a rank's
receive request queues behind its own send, so the link works in one direction at a time unless two
ranks start at the same moment.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Arrival:
    """What is under way of one exchange, to and from this rank."""

    _works: tuple[dist.Work, ...]

    def wait(self) -> None:
        """Returns when the bytes are there and the buffer may change.

        Raises:
            RuntimeError: another rank ended, or the group's timeout passed.
        """
        for work in self._works:
            work.wait()


def exchange(
    buffer: torch.Tensor,
    input_byte_splits: list[int],
    output_byte_splits: list[int],
    group: dist.ProcessGroup,
) -> tuple[torch.Tensor, Arrival]:
    """Returns the bytes that will be received, uint8 [sum(output_byte_splits)], and their arrival.

    Args:
        buffer: uint8 [sum(input_byte_splits)].
        input_byte_splits: bytes to each rank of the group, none to itself.
        output_byte_splits: bytes from each rank of the group.
        group: process group.
    """
    received = buffer.new_empty(sum(output_byte_splits))
    if dist.get_backend(group) == "gloo":
        incoming, outgoing = received.split(output_byte_splits), buffer.split(input_byte_splits)
        return received, Arrival(_receives_then_sends(incoming, outgoing, group))
    work = dist.all_to_all_single(
        received, buffer, output_byte_splits, input_byte_splits, group=group, async_op=True
    )
    return received, Arrival((work,))


def _receives_then_sends(
    incoming: tuple[torch.Tensor, ...], outgoing: tuple[torch.Tensor, ...], group: dist.ProcessGroup
) -> tuple[dist.Work, ...]:
    """Posts receives, then sends, of peers with bytes; each rank starts with its next neighbour."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    sources = [peer % size for peer in range(rank - 1, rank - size, -1)]
    targets = [peer % size for peer in range(rank + 1, rank + size)]
    works = [
        dist.irecv(incoming[peer], group=group, group_src=peer)
        for peer in sources
        if incoming[peer].numel()
    ]
    works += [
        dist.isend(outgoing[peer], group=group, group_dst=peer)
        for peer in targets
        if outgoing[peer].numel()
    ]
    return tuple(works)
