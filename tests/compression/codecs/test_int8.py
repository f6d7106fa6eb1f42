import torch

from megatron_moe_comp.compression.codecs.int8 import Int8
from tests.compression.variants import RANDOM, normal_rows, plan, roundtrip


def test_codes_and_scales():
    rows = torch.tensor([[127.0, -127.0, 0.4, -0.6, 1.5, 2.5, 64.0, -1.0]]) / 2
    packet = plan(Int8(), rows, (1,))
    message = packet.encode(rows, [], RANDOM)
    assert message[:8].view(torch.int8).tolist() == [127, -127, 0, -1, 2, 2, 64, -1]
    assert message[16:20].view(torch.float32).item() == 63.5


def test_the_error_is_at_most_half_a_step():
    rows = normal_rows()
    rows[0, 0] = 50.0
    step = rows.abs().amax(1, keepdim=True) / 127
    assert ((roundtrip(Int8(), rows) - rows).abs() <= step * 0.50001).all()
