"""What GPUs exchange by NCCL against what the same processes exchange by gloo, bit for bit.

torchrun --nproc-per-node 2 -m tests.comm.on_gpus
"""

import os
import sys

import torch
import torch.distributed as dist

from megatron_moe_comp.comm.all_to_all import Message, compressed_all_to_all
from megatron_moe_comp.comm.routes import Route
from megatron_moe_comp.compression.codecs import CODECS
from megatron_moe_comp.compression.random_stream import RandomStream
from megatron_moe_comp.stats.comm_stats import CommStats
from tests.compression.variants import all_bits

HIDDEN = 256
ROUNDED_ALIKE = set(CODECS) - {"pwlq"}
"""Codecs without a logarithm or a mean, whose last bit is each device's own."""


def exchanged(rank, name, pieces, device, group):
    """What arrives, and the gradients, of rows that follow from the rank, on the CPU."""
    size, codec = dist.get_world_size(), CODECS[name]()
    counts = 5 + 7 * torch.arange(size)[:, None] + 3 * torch.arange(size)
    widths = all_bits(codec)
    bits = widths[0] + counts % len(widths)
    plain = torch.eye(size, dtype=torch.bool)
    route = Route.of_rank(group, rank, counts, bits, counts, plain)
    generator = torch.Generator().manual_seed(rank)
    rows, weights = (torch.randn(sum(n), HIDDEN, generator=generator) for n in (
        route.sent.rows, route.received.rows))  # fmt: skip
    rows, weights = (t.to(device, torch.bfloat16) for t in (rows, weights))
    probs = torch.rand(len(rows), generator=generator).to(device).requires_grad_()
    rows.requires_grad_()
    random = RandomStream(key=rank << 32 | 7, offset=1, stream=2)
    messages = tuple(Message(w, codec, random, pieces) for w in ("dispatch_fwd", "dispatch_bwd"))
    arrived, arrived_probs, _ = compressed_all_to_all(
        rows, probs, None, (route, route), messages, CommStats()
    )
    torch.autograd.backward((arrived, arrived_probs), (weights, arrived_probs.detach() * 3))
    return [t.detach().cpu() for t in (arrived, arrived_probs, rows.grad, probs.grad)]


def differing(rank, device, group, cpu_group):
    """The codecs and pieces whose results on the device are not those of the CPU."""
    found = []
    for name, codec in CODECS.items():
        for pieces in (1,) if codec().is_segment_wide else (1, 3):
            ours = exchanged(rank, name, pieces, device, group)
            theirs = exchanged(rank, name, pieces, torch.device("cpu"), cpu_group)
            bound = 0.0 if name in ROUNDED_ALIKE else 0.1
            for a, b in zip(ours, theirs, strict=True):
                if (a.double() - b.double()).norm() > bound * b.double().norm() or a.isnan().any():
                    found.append((name, pieces))
    return found


def main():
    if torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
        sys.exit("a GPU for each process is needed; nothing was tested")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    found = differing(dist.get_rank(), device, dist.group.WORLD, dist.new_group(backend="gloo"))
    print(f"rank {dist.get_rank()}: {len(CODECS)} codecs; not as on the CPU: {found}", flush=True)
    dist.destroy_process_group()
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
