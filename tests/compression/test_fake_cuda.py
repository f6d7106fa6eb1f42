"""The Python side on tensors that say they are on a GPU: devices, dtypes and shapes."""

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_moe_comp import ops
from megatron_moe_comp.compression.packet import Exact, Packet, Peer
from megatron_moe_comp.ops.quantize_pack import quantize
from megatron_moe_comp.ops.unpack_dequantize import unpack
from tests.compression.variants import (
    DTYPES,
    RANDOM,
    SEGMENT_ROWS,
    VARIANTS,
    VARIANTS_AND_BITS,
    all_bits,
)

PROBS = Exact(SEGMENT_ROWS, 4)


@pytest.mark.parametrize(("name", "num_bits"), VARIANTS_AND_BITS)
def test_packets_stay_on_the_device(name, num_bits):
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


@pytest.mark.parametrize("name", [n for n, c in VARIANTS.items() if hasattr(c, "encode_rows")])
def test_codecs_stay_on_the_device(name):
    codec = VARIANTS[name]
    with FakeTensorMode():
        rows = torch.empty(16, 72, device="cuda", dtype=torch.bfloat16)
        numbers = torch.empty(16, device="cuda", dtype=torch.int64)
        for num_bits in all_bits(codec):
            sections = codec.sections(72, rows.dtype, num_bits)
            parts = codec.encode_rows(rows, numbers, num_bits, RANDOM)
            for part, section in zip(parts, sections, strict=True):
                assert part.device.type == "cuda"
                shape = (16, section.row_bytes) if section.row_bytes else (1, section.segment_bytes)
                assert (len(part), part[0].numel() * part.itemsize) == shape
            octets = [part.contiguous().view(torch.uint8) for part in parts]
            decoded = codec.decode_rows(octets, num_bits, 72, torch.bfloat16)
            assert (decoded.device, decoded.dtype, decoded.shape) == (
                rows.device,
                rows.dtype,
                rows.shape,
            )


@pytest.mark.parametrize("num_bits", [3, 8])
@pytest.mark.parametrize("scales_are_given", [False, True])
def test_references_stay_on_the_device(num_bits, scales_are_given):
    pack_reference, unpack_reference = (
        sys.modules[function.__module__]._reference for function in (quantize, unpack)
    )
    segments = ops.flatten(
        [ops.OpSegment(0, 5, num_bits, 0, 512), ops.OpSegment(5, 11, 4, 1024, 0)]
    )
    with FakeTensorMode():
        rows = torch.empty(16, 64, device="cuda", dtype=torch.bfloat16)
        scales = torch.empty(16, device="cuda") if scales_are_given else None
        message = torch.empty(2048, device="cuda", dtype=torch.uint8)
        pack_reference(rows, scales, message, segments, 1, 2, 3)
        unpack_reference(message, scales, rows, segments)
        sys.modules[ops.unpack_dithered.__module__]._reference(
            message, rows, segments, [3, 1, 7, 2], 2, 3
        )
        codes = quantize(rows, torch.empty(16, device="cuda"), num_bits, 0, **vars(RANDOM))
        assert (codes.device.type, codes.dtype, codes.shape) == ("cuda", torch.uint8, (16, 64))


@pytest.mark.parametrize("name", list(ops.CAST_FORMATS))
def test_cast_references_stay_on_the_device(name):
    module, num_bits = (
        sys.modules["megatron_moe_comp.ops.cast_pack"],
        ops.CAST_FORMATS[name].num_bits,
    )
    segments = ops.flatten(
        [ops.OpSegment(0, 5, num_bits, 0, 1024), ops.OpSegment(5, 11, num_bits, 2048, 0)]
    )
    with FakeTensorMode():
        rows = torch.empty(16, 72, device="cuda", dtype=torch.bfloat16)
        message = torch.empty(4096, device="cuda", dtype=torch.uint8)
        module._pack_reference(rows, message, segments, name)
        module._unpack_reference(message, rows, segments, name)


def test_references_of_gaussian_stay_on_the_device():
    segments = ops.flatten([ops.OpSegment(0, 5, 3, 0, 512), ops.OpSegment(5, 11, 4, 1024, 0)])
    module = sys.modules[ops.gaussian_pack.__module__]
    with FakeTensorMode():
        rows = torch.empty(16, 64, device="cuda", dtype=torch.bfloat16)
        message = torch.empty(2048, device="cuda", dtype=torch.uint8)
        module._pack_reference(rows, message, segments)
        module._unpack_reference(message, rows, segments)
        scales = module.rms(rows)
        assert (scales.device.type, scales.dtype, scales.shape) == ("cuda", torch.bfloat16, (16,))


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
