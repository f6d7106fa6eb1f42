"""The check that runs on GPUs, without one."""

import torch
import torch.distributed as dist

from megatron_moe_comp.compression.codecs.int8 import Int8
from tests.comm.on_gpus import differing


def found(rank, broken):
    if broken and rank == 0:
        encode = Int8.encode_rows
        calls = []

        def wrong(self, rows, *args):
            calls.append(1)
            codes, scales = encode(self, rows, *args)
            return codes + (len(calls) == 1), scales

        Int8.encode_rows = wrong
        try:
            return found(rank, False)
        finally:
            Int8.encode_rows = encode
    return differing(rank, torch.device("cpu"), dist.group.WORLD, dist.group.WORLD)


def test_the_check_finds_what_differs(pool):
    results = pool.run(found, False)
    assert not any(results)
    results = pool.run(found, True)
    assert ("int8", 1) in results[1]
    assert all(name == "int8" for result in results for name, _ in result)
