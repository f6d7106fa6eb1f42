import pytest
import torch

from megatron_moe_comp.compression.codecs.topk import TopK
from tests.compression.variants import DTYPES, RANDOM, all_bits, normal_rows, plan, roundtrip


@pytest.mark.parametrize("num_bits", all_bits(TopK()))
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_arrive_and_the_rest_are_zeros(dtype, num_bits):
    rows = normal_rows(dtype, hidden=64)
    count = 2 * num_bits
    smallest_kept = rows.abs().sort(dim=1, descending=True).values[:, count - 1 : count]
    decoded = roundtrip(TopK(), rows, num_bits=num_bits)
    is_kept = decoded != 0
    assert (is_kept.sum(1) == count).all()
    assert (rows.abs()[is_kept] >= smallest_kept.expand_as(rows)[is_kept]).all()
    wire = torch.float16 if dtype == torch.float16 else torch.bfloat16
    assert torch.equal(decoded[is_kept], rows[is_kept].to(wire).to(dtype))


def test_the_lower_of_equal_columns_is_sent():
    rows = torch.tensor([1.0, -2.0, 2.0, 1.0] * 64).repeat(3, 1)
    decoded = roundtrip(TopK(), rows, num_bits=6)  # 48 of 256
    expected = torch.where(rows.abs() == 2, rows, 0.0)
    expected[:, 96:] = 0
    assert torch.equal(decoded, expected)


def test_columns_are_16_bits_wide():
    rows = torch.zeros(1, 65536)
    rows[0, [0, 40000, 65535]] = torch.tensor([1.0, 2.0, -3.0])
    assert torch.equal(roundtrip(TopK(), rows, num_bits=2), rows)
    with pytest.raises(ValueError, match=r"65544.*at most 65536"):
        TopK().sections(65544, torch.float32, 2)


def test_entries_are_by_descending_magnitude():
    rows = torch.tensor([[1.0, -5.0, 3.0, 0, 0, 0, 0, 0]])
    packet = plan(TopK(), rows, (1,), 8)
    message = packet.encode(rows, [], RANDOM)
    assert message[:4].view(torch.bfloat16).tolist() == [-5.0, 3.0]
    assert message[16:20].view(torch.uint16).tolist() == [1, 2]
