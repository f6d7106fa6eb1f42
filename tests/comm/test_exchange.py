"""exchange() against the bytes that every rank knows the others to send, and its order on gloo."""

import os
import threading
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megatron_moe_comp.comm.exchange import exchange
from tests.gloo import GlooPool

# Bytes from rank s to rank d, as counts[s][d], of the first ranks that there are.
LOADS = {
    "balanced": [[0 if s == d else 1000 for d in range(4)] for s in range(4)],
    "unequal": [[0, 17, 0, 5], [9, 0, 80_000, 1], [0, 1, 0, 300], [7, 0, 2_000_000, 0]],
    "a rank sends nothing": [[0, 0, 0, 0], [5, 0, 1, 2], [2, 2, 0, 2], [1, 9, 0, 0]],
    "all to one": [[0, 0, 0, 0], [11, 0, 0, 0], [3, 0, 0, 0], [8, 0, 0, 0]],
    "nothing at all": [[0] * 4] * 4,
}


def sent_bytes(source, target, count, round_number):
    generator = torch.Generator().manual_seed(100 * round_number + 10 * source + target)
    return torch.randint(256, (count,), dtype=torch.uint8, generator=generator)


def exchanges(rank, load, backend=None):
    """Two that are under way at the same time, waited for in either order."""
    counts = torch.tensor(LOADS[load])[: dist.get_world_size(), : dist.get_world_size()]
    sent, received = counts[rank].tolist(), counts[:, rank].tolist()
    for order in ((0, 1), (1, 0)):
        with patch.object(dist, "get_backend", lambda _: backend or "gloo"):
            under_way = [
                exchange(
                    torch.cat([sent_bytes(rank, d, n, number) for d, n in enumerate(sent)]),
                    sent,
                    received,
                    dist.group.WORLD,
                )
                for number in range(2)
            ]
        for number in order:
            arrived, arrival = under_way[number]
            arrival.wait()
            expected = [sent_bytes(s, rank, n, number) for s, n in enumerate(received)]
            assert torch.equal(arrived, torch.cat(expected))


@pytest.mark.parametrize("load", LOADS)
def test_the_bytes_of_every_rank_arrive(pool, load):
    pool.run(exchanges, load)


def test_other_backends_do_it_as_one_collective(pool):
    pool.run(exchanges, "balanced", "nccl")


def operations(rank):
    """What is asked of gloo by one exchange, in order."""
    asked, counts = [], LOADS["balanced"][rank][: dist.get_world_size()]

    def noted(name, operation):
        def note(values, **kwargs):
            asked.append((name, kwargs.get("group_src", kwargs.get("group_dst"))))
            return operation(values, **kwargs)

        return note

    with (
        patch.object(dist, "irecv", noted("receive", dist.irecv)),
        patch.object(dist, "isend", noted("send", dist.isend)),
    ):
        buffer = torch.zeros(sum(counts), dtype=torch.uint8)
        exchange(buffer, counts, counts, dist.group.WORLD)[1].wait()
    return asked


def test_all_receives_are_asked_for_before_the_first_byte_is_sent(pool):
    found = pool.run(operations)
    size = len(found)
    for rank, asked in enumerate(found):
        assert [name for name, _ in asked] == ["receive"] * (size - 1) + ["send"] * (size - 1)
        # In every turn each rank is sent to by one other, and that one is waited for.
        for turn in range(1, size):
            assert asked[turn - 1] == ("receive", (rank - turn) % size)
            assert asked[size - 2 + turn] == ("send", (rank + turn) % size)


def wait_for_a_rank_that_ends(rank):
    if rank == 1:
        threading.Timer(0.2, os._exit, (1,)).start()
        return None
    empty = torch.zeros(0, dtype=torch.uint8)
    _, arrival = exchange(empty, [0, 0], [0, 8], dist.group.WORLD)
    with pytest.raises(RuntimeError, match=r"closed|reset"):
        arrival.wait()
    return "told"


def test_a_rank_that_ends_is_an_error_for_those_who_wait():
    pool = GlooPool(2)
    try:
        assert pool.run(wait_for_a_rank_that_ends)[0] == "told"
    finally:
        pool.close()
