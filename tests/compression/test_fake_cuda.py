"""The Python side on tensors that say they are on a GPU: devices, dtypes and shapes."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_moe_comp import ops
from megatron_moe_comp.compression.packet import Exact, Packet, Peer
from tests.compression.variants import (
    DTYPES,
    RANDOM,
    SEGMENT_ROWS,
    VARIANTS,
    all_bits,
    normal_rows,
    usual_bits,
)
from tests.fake_gpu import CUDA_KERNELS, fake_gpu, values

PROBS = Exact(SEGMENT_ROWS, 4)


@pytest.mark.parametrize("name", VARIANTS)
def test_packets_stay_on_the_device(name):
    num_bits = usual_bits(VARIANTS[name])
    for dtype in DTYPES:
        with FakeTensorMode():
            rows = torch.empty(16, 72, device="cuda", dtype=dtype)
            probs = torch.empty(16, device="cuda")
            peers = [Peer(n, num_bits, VARIANTS[name]) for n in SEGMENT_ROWS]
            packet = Packet.plan(peers, -1, rows, [PROBS])
            message = packet.encode(rows, [probs], RANDOM)
            assert (message.device.type, message.dtype) == ("cuda", torch.uint8)
            assert message.shape == (sum(packet.layout.byte_splits),)
            packet.decode(message, torch.empty_like(rows), [torch.empty_like(probs)], RANDOM)


WITHOUT_AND_WITH_KERNELS = [pytest.param(name, frozenset(), id=name) for name in VARIANTS] + [
    pytest.param(name, CUDA_KERNELS, id=f"{name}-kernels")
    for name, codec in VARIANTS.items()
    if CUDA_KERNELS.intersection(codec.kernels)
]


@pytest.mark.parametrize(("name", "kernels"), WITHOUT_AND_WITH_KERNELS)
def test_packets_are_those_of_the_cpu(name, kernels):
    """On a GPU, too, for which the host never waits."""
    codec = VARIANTS[name]
    widths = all_bits(codec)
    widths = widths[0], widths[len(widths) // 2], widths[-1]
    rows, probs = normal_rows(torch.bfloat16, hidden=72), torch.rand(16)
    packet = Packet.plan(
        [Peer(n, b, codec) for n, b in zip((5, 2, 9), widths, strict=True)],
        -1,
        rows,
        [Exact((5, 2, 9), 4)],
    )
    expected = packet.encode(rows, [probs], RANDOM)
    decoded, probs_decoded = torch.full_like(rows, math.nan), torch.full_like(probs, math.nan)
    packet.decode(expected, decoded, [probs_decoded], RANDOM)
    with fake_gpu(kernels) as gpu:
        message = packet.encode(gpu.tensor(rows), [gpu.tensor(probs)], RANDOM)
        arrived = [gpu.tensor(torch.full_like(t, math.nan)) for t in (rows, probs)]
        packet.decode(message, arrived[0], arrived[1:], RANDOM)
    assert (message.device.type, message.dtype) == ("cuda", torch.uint8)
    assert gpu.waits == []
    assert torch.equal(values(message), expected)
    for ours, theirs in zip(arrived, (decoded, probs_decoded), strict=True):
        assert torch.equal(values(ours), theirs)


def test_hashing_and_clustering_stay_on_the_device():
    with FakeTensorMode():
        rows = torch.empty(10, 24, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        signs = torch.empty(2, 3, 32, device="cuda")
        directions = torch.empty(24, 40, device="cuda")
        order = torch.empty(10, dtype=torch.int64, device="cuda")
        offsets = torch.empty(5, dtype=torch.int64, device="cuda")
        for keys in (
            ops.hadamard_hash(rows, signs, 40, 16),
            ops.dense_hash(rows, directions, 40, 16),
        ):
            assert (keys.device.type, keys.dtype, keys.shape) == ("cuda", torch.int64, (10,))
        means = ops.cluster_sum(rows, order, offsets, mean=True)
        again = ops.cluster_broadcast(means, order, offsets)
        for values, number in ((means, 4), (again, 10)):
            assert (values.device.type, values.dtype) == ("cuda", torch.bfloat16)
            assert values.shape == (number, 24)
            assert values.requires_grad
        with pytest.raises(ValueError, match="rotation must be float32 on cuda"):
            ops.hadamard_hash(rows, signs.cpu(), 40, 16)
