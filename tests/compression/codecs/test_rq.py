import torch

from megatron_moe_comp.compression.codecs.rq import RandomQuantization
from tests.compression.variants import RANDOM, plan


def test_bytes_of_zeros_have_one_sign():
    codec, zeros = RandomQuantization(), torch.zeros(2, 16)
    packet = plan(codec, zeros, (1, 1))
    message = packet.encode(torch.stack((zeros[0], -zeros[1])), [], RANDOM)
    first, second = message.split(packet.layout.byte_splits)
    assert torch.equal(first, second)
    assert not first[16:].any()  # the scale


def test_the_scale_of_a_chunk_is_its_rows_largest_magnitude():
    rows = torch.tensor([[1.0] * 8, [-4.0] * 8, [2.0] * 8])
    packet = plan(RandomQuantization(scale_per="chunk"), rows, (2, 1))
    message = packet.encode(rows, [], RANDOM)
    scales = [
        message[s.offsets[1] :][:4].clone().view(torch.float32).item()
        for s in packet.segments[0][1]
    ]
    assert scales == [4.0, 2.0]
