import pytest
import torch

from megatron_moe_comp.compression.codecs.lq import LinearQuantization
from megatron_moe_comp.compression.codecs.shapeshifter import Shapeshifter
from tests.compression.variants import RANDOM, all_bits, normal_rows, plan, roundtrip


def ranges_of(codec, rows, segment_rows):
    packet = plan(codec, rows, segment_rows)
    message = packet.encode(rows, [], RANDOM)
    sizes = [codec.range_section.size(s.num_rows) for s in packet.segments[0][1]]
    offsets = [s.offsets[1] for s in packet.segments[0][1]]
    octets = [message[o : o + n].clone() for o, n in zip(offsets, sizes, strict=True)]
    return torch.cat(octets).view(torch.float32).view(-1, 2)


@pytest.mark.parametrize("num_bits", all_bits(LinearQuantization()))
@pytest.mark.parametrize("codec", [LinearQuantization(), Shapeshifter()])
def test_values_become_the_nearest_level(codec, num_bits):
    rows = normal_rows(hidden=64) + 10
    decoded = roundtrip(codec, rows, num_bits=num_bits)
    dim = None if codec.is_segment_wide else 1
    low, high = rows.amin(dim, keepdim=True), rows.amax(dim, keepdim=True)
    step = (high - low) / (2**num_bits - 1)
    levels = (low + torch.arange(2**num_bits) * step)[..., None, :].expand(16, 1, -1)
    best = (rows[..., None] - levels).abs().amin(-1)
    torch.testing.assert_close((decoded - rows).abs(), best, rtol=0, atol=1e-5)
    assert torch.equal(decoded[rows == low.expand(16, 64)], rows[rows == low.expand(16, 64)])
    assert torch.equal(decoded[rows == high.expand(16, 64)], rows[rows == high.expand(16, 64)])


def test_what_is_sent_beside_the_codes():
    rows = normal_rows(hidden=8)
    low, high = rows.amin(1), rows.amax(1)
    assert torch.equal(ranges_of(Shapeshifter(), rows, (5, 11)), torch.stack((low, high), 1))
    expected = [[low[:5].min(), high[:5].max()], [low[5:].min(), high[5:].max()]]
    assert torch.equal(ranges_of(LinearQuantization(), rows, (5, 11)), torch.tensor(expected))


def test_a_range_wider_than_float32():
    rows = torch.tensor([[-3e38, 3e38, 1e38, -1e38] * 2])
    assert torch.allclose(roundtrip(Shapeshifter(), rows, num_bits=2), rows)
