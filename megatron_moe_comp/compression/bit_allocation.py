"""Load-aware mixed precision: how many bits the rows between two expert-parallel ranks get.

An all-to-all ends when its most loaded node ends. Rows to or from loaded nodes get fewer bits and
rows between idle ones more, at no more than the same average. Every rank allocates on its own, from
the counts that all of them have, so everything is in integers.

Shapes: P ranks. A link (s, d) carries the rows that rank s sends to rank d in one dispatch; the
diagonal, rows that stay, never counts. Load: rows that a node receives from the others.
"""

from collections.abc import Callable, Mapping

import torch

from megatron_moe_comp import ops


def allocate_bits(
    num_rows: torch.Tensor,
    policy: str,
    *,
    target_bits: int,
    min_bits: int,
    max_bits: int,
) -> torch.Tensor:
    """Returns the bits of each value of the rows from rank s to rank d, int64 [P, P].

    Args:
        num_rows: int64 [P, P] on the CPU, rows that rank s sends to rank d.
        policy: a name in `POLICIES`.
        target_bits: the average to aim at, from `min_bits` to `max_bits`.
        min_bits: at least 2.
        max_bits: at most 8.
    """
    return POLICIES[policy](num_rows, target_bits, min_bits, max_bits)


def uniform(num_rows: torch.Tensor, target_bits: int, min_bits: int, max_bits: int) -> torch.Tensor:
    """Returns `target_bits` for every link, whatever its load."""
    return torch.full_like(num_rows, target_bits)


def proportional(
    num_rows: torch.Tensor, target_bits: int, min_bits: int, max_bits: int
) -> torch.Tensor:
    """Returns bits inversely proportional to the receiver's load: target * mean(load) / load.

    The quotient is rounded, halves up, and clamped; a node that receives nothing gets `max_bits`.
    Nodes may exceed the mean traffic, and the average may exceed the target, by what the rounding
    and `min_bits` add.
    """
    ranks = len(num_rows)
    load_D = num_rows.sum(dim=0) - num_rows.diagonal()
    divisor_D = 2 * ranks * load_D.clamp(min=1)
    bits_D = (2 * target_bits * load_D.sum() + ranks * load_D) // divisor_D
    bits_D = torch.where(load_D > 0, bits_D.clamp(min_bits, max_bits), max_bits)
    return bits_D.expand(ranks, ranks).contiguous()


def optimal(num_rows: torch.Tensor, target_bits: int, min_bits: int, max_bits: int) -> torch.Tensor:
    """Returns bits per link that nearly minimise the variance while traffic is even.

    See `ops.allocate_bits`. No node exceeds the mean traffic at `target_bits`, unless it does at
    `min_bits`. Links without rows, and rows that stay, get `max_bits`.
    """
    return ops.allocate_bits(num_rows, target_bits, min_bits, max_bits)


POLICIES: Mapping[str, Callable[[torch.Tensor, int, int, int], torch.Tensor]] = {
    "uniform": uniform,
    "proportional": proportional,
    "optimal": optimal,
}


def variance(num_rows: torch.Tensor, bits: torch.Tensor) -> float:
    """Returns the quantization variance of rows of unit scale: sum n / (2^(b-1) - 1)^2.

    Args:
        num_rows: int64 [P, P].
        bits: int64 [P, P], at least 2.
    """
    levels = 2.0 ** (bits - 1).double() - 1
    variance_SD = num_rows.double() / levels.square()
    return (variance_SD.sum() - variance_SD.trace()).item()


def most_loaded(link_bytes: torch.Tensor) -> int:
    """Returns the bytes of the rank, or node, that sends most to others or receives most.

    Args:
        link_bytes: int64 [P, P], bytes from s to d.
    """
    crossing = link_bytes - link_bytes.diagonal().diag()
    return int(torch.maximum(crossing.sum(dim=0), crossing.sum(dim=1)).max())


def between_nodes(link_bytes: torch.Tensor, node_of_rank: torch.Tensor) -> torch.Tensor:
    """Returns the bytes from node s to node d, int64 [nodes, nodes].

    Args:
        link_bytes: int64 [P, P], bytes from rank s to rank d.
        node_of_rank: int64 [P], numbered from 0.
    """
    nodes = int(node_of_rank.max()) + 1
    to_ranks = link_bytes.new_zeros(nodes, len(link_bytes)).index_add_(0, node_of_rank, link_bytes)
    return link_bytes.new_zeros(nodes, nodes).index_add_(1, node_of_rank, to_ranks)
