"""The Python side on tensors that say they are on a GPU: devices, dtypes and shapes."""

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_moe_comp.compression.codec import RowFormat
from megatron_moe_comp.compression.codecs.identity import Identity
from megatron_moe_comp.compression.codecs.rq import RandomQuantization
from megatron_moe_comp.compression.payload import PayloadLayout
from megatron_moe_comp.compression.random_stream import RandomStream
from megatron_moe_comp.ops.quantize_pack import quantize
from megatron_moe_comp.ops.unpack_dequantize import unpack

ROWS = (5, 0, 11)


@pytest.mark.parametrize("codec", [Identity(), RandomQuantization(), RandomQuantization("chunk")])
def test_codec_and_payload_stay_on_the_device(codec):
    with FakeTensorMode():
        rows = torch.empty(16, 64, device="cuda", dtype=torch.bfloat16)
        row_format = RowFormat(64, rows.dtype, 6)
        layout = PayloadLayout(codec.sections(row_format), ROWS)
        buffer = layout.pack(codec.encode(rows, ROWS, row_format, RandomStream(1, 2, 3)))
        assert buffer.device.type == "cuda"
        assert buffer.shape == (sum(layout.byte_splits()),)
        decoded = codec.decode(layout.unpack(buffer), ROWS, row_format)
        assert (decoded.device, decoded.dtype, decoded.shape) == (
            rows.device,
            rows.dtype,
            rows.shape,
        )


@pytest.mark.parametrize("num_bits", [3, 8])
def test_references_stay_on_the_device(num_bits):
    pack_reference, unpack_reference = (
        sys.modules[function.__module__]._reference for function in (quantize, unpack)
    )
    with FakeTensorMode():
        rows = torch.empty(16, 64, device="cuda", dtype=torch.bfloat16)
        scales = torch.empty(16, device="cuda")
        packed = pack_reference(rows, scales, num_bits, 1, 2, 3)
        assert (packed.device.type, packed.shape) == ("cuda", (16, 8 * num_bits))
        decoded = unpack_reference(packed, scales, num_bits, 64, torch.bfloat16)
        assert (decoded.device.type, decoded.shape) == ("cuda", (16, 64))
