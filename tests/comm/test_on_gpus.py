"""The check that runs on GPUs, without one: it finds a message that is wrong, and nothing else."""

from unittest.mock import patch

import torch
import torch.distributed as dist

from megatron_moe_comp.compression.codecs.int8 import Int8
from tests.comm.on_gpus import differing


def found(rank):
    calls = []
    encode = Int8.encode_rows

    def wrong(self, rows, *args):
        calls.append(1)
        codes, scales = encode(self, rows, *args)
        return codes + (rank == 0 and len(calls) == 1), scales

    with patch.object(Int8, "encode_rows", wrong):
        return differing(rank, torch.device("cpu"), dist.group.WORLD, dist.group.WORLD)


def test_the_check_finds_what_differs(pool):
    own, *others = pool.run(found)
    assert own == []
    assert others[0] == [("int8", 1)]  # who got the first message
    assert not any(others[1:])
