"""Every codec: round trip, error floor, byte count, special rows, determinism."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_comp.compression.codecs import CODECS
from tests.compression.variants import (
    DTYPES,
    RANDOM,
    RANDOM_VARIANTS,
    SEGMENT_ROWS,
    VARIANTS,
    VARIANTS_AND_BITS,
    all_bits,
    normal_rows,
    plan,
    roundtrip,
    sqnr,
)

# Bits of a row of H values at b bits.
ROW_BITS = {
    "identity": lambda h, b: 32 * h,
    "bf16": lambda h, b: 16 * h,
    "fp16": lambda h, b: 16 * h,
    "int8": lambda h, b: 8 * h + 32,
    "fp8": lambda h, b: 8 * h + 32 * math.ceil(h / 128),
    "mxfp8": lambda h, b: 8 * h + 8 * math.ceil(h / 32),
    "rq-row": lambda h, b: b * h + 32,
    "rq-chunk": lambda h, b: b * h,
    "dithered": lambda h, b: b * h + 32,
    "gaussian": lambda h, b: b * h + 16,
    "lq": lambda h, b: b * h,
    "shapeshifter": lambda h, b: b * h + 64,
    "pwlq": lambda h, b: b * h + 64,
    "terngrad": lambda h, b: 8 * math.ceil(h / 5) + 32,
    "topk": lambda h, b: 32 * max(1, h * b // 32),
}
SEGMENT_BITS = {"rq-chunk": 32, "lq": 64}

# Measured on 512 rows of 256 normal values, less 0.5 dB; one for each number of bits.
FLOORS = {
    "bf16": (55.1,),
    "fp16": (73.1,),
    "int8": (42.6,),
    "fp8": (31.3,),
    "mxfp8": (30.2,),
    "rq-row": (-2.1, 7.1, 14.4, 21.0, 27.4, 33.5, 39.6),
    "rq-chunk": (-4.8, 3.6, 11.0, 17.6, 23.9, 30.1, 36.2),
    "dithered": (4.0, 11.4, 18.0, 24.3, 30.5, 36.6, 42.6),
    "gaussian": (8.2, 13.9, 19.7),
    "lq": (0.3, 8.2, 14.8, 21.1, 27.3, 33.4, 39.4),
    "shapeshifter": (4.7, 12.1, 18.7, 25.0, 31.2, 37.3, 43.3),
    "pwlq": (10.8, 18.4, 25.1, 31.4, 37.5, 43.6),
    "terngrad": (-2.1,),
    "topk": (1.2, 1.8, 2.5, 3.1, 3.8, 4.4, 5.0),
}


@pytest.fixture(params=VARIANTS)
def name(request):
    return request.param


@pytest.fixture
def codec(name):
    return VARIANTS[name]


def test_every_codec_is_tested():
    assert {codec.name for codec in VARIANTS.values()} == set(CODECS)
    assert all(cls.name == name for name, cls in CODECS.items())


@pytest.mark.parametrize("name", [n for n in VARIANTS if n != "identity"])
def test_equal_codecs_are_one_key(codec):
    assert len({codec, replace(codec)}) == 1
    assert sum(other == codec for other in VARIANTS.values()) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_shape_and_dtype(codec, dtype):
    rows = normal_rows(dtype)
    decoded = roundtrip(codec, rows, SEGMENT_ROWS)
    assert decoded.isfinite().all()  # every row was written
    assert sqnr(rows, decoded) > -5


@pytest.mark.parametrize(("name", "num_bits"), VARIANTS_AND_BITS)
def test_sqnr_floor(name, num_bits):
    if name == "identity":
        assert sqnr(normal_rows(), roundtrip(VARIANTS[name], normal_rows())) == math.inf
        return
    rows = normal_rows(num_rows=512)
    measured = sqnr(rows, roundtrip(VARIANTS[name], rows, num_bits=num_bits))
    floor = FLOORS[name][num_bits - (VARIANTS[name].num_bits_range or (6,))[0]]
    assert floor < measured < floor + 1


@pytest.mark.parametrize(("name", "num_bits"), VARIANTS_AND_BITS)
def test_bytes_are_as_documented(name, num_bits):
    for hidden in (8, 40, 256, 1000):
        sections = VARIANTS[name].sections(hidden, torch.float32, num_bits)
        assert 8 * sum(s.row_bytes for s in sections) == ROW_BITS[name](hidden, num_bits)
        assert 8 * sum(s.segment_bytes for s in sections) == SEGMENT_BITS.get(name, 0)
    assert VARIANTS[name].is_segment_wide == (name in SEGMENT_BITS)


@pytest.mark.parametrize(("name", "num_bits"), VARIANTS_AND_BITS)
def test_encode_writes_its_sections_and_nothing_else(name, num_bits):
    rows = normal_rows(hidden=40)
    packet = plan(VARIANTS[name], rows, num_bits=num_bits)
    ((codec, segments),) = packet.segments
    messages = []
    for poison in (0x55, 0xAA):
        message = torch.full((sum(packet.layout.byte_splits),), poison, dtype=torch.uint8)
        codec.encode(rows, segments, message, RANDOM)
        messages.append(message)
    written = torch.zeros(len(message), dtype=torch.bool)
    for segment in segments:
        sections = codec.sections(40, rows.dtype, num_bits)
        for section, offset in zip(sections, segment.offsets, strict=True):
            written[offset : offset + section.size(segment.num_rows)] = True
    assert torch.equal(messages[0][written], messages[1][written])
    assert (messages[0][~written] == 0x55).all()
    assert (messages[1][~written] == 0xAA).all()


def test_decode_writes_its_rows_and_nothing_else(codec):
    rows = normal_rows()
    packet = plan(codec, rows, SEGMENT_ROWS)
    ((_, segments),) = packet.segments
    message = packet.encode(rows, [], RANDOM)
    decoded = torch.full_like(rows, math.nan)
    codec.decode(message, segments[1:], decoded, RANDOM)
    assert decoded[:5].isnan().all()
    assert torch.equal(decoded[5:], roundtrip(codec, rows, SEGMENT_ROWS)[5:])


@pytest.mark.parametrize("hidden", [8, 40, 136, 200])
def test_any_multiple_of_eight_columns(name, codec, hidden):
    rows = normal_rows(hidden=hidden, num_rows=64)
    decoded = roundtrip(codec, rows, num_bits=all_bits(codec)[-1])
    # A short row has a smaller largest value, but of that mxfp8 and topk profit least.
    assert sqnr(rows, decoded) > (FLOORS[name][-1] - 2 if name != "identity" else 100)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -3.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_rows(name, codec, value, dtype):
    rows = torch.full((16, 32), value, dtype=dtype)
    expected = rows.clone()
    if name == "topk":
        expected[:, 6:] = 0
    decoded = roundtrip(codec, rows, SEGMENT_ROWS)
    if name in ("fp8", "dithered", "gaussian") and value:
        tolerance = {"fp8": 1e-6, "dithered": 0.51 / 31.5, "gaussian": 0.06}[name]
        torch.testing.assert_close(decoded, expected, rtol=tolerance, atol=0)
    else:
        assert torch.equal(decoded, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros_among_others(name, codec, dtype):
    rows = normal_rows(dtype)
    rows[3] = 0
    rows[7] = -0.0
    decoded = roundtrip(codec, rows, SEGMENT_ROWS)
    assert decoded.isfinite().all()
    if name != "lq":
        assert (decoded[3] == 0).all()
        assert (decoded[7] == 0).all()


@pytest.mark.parametrize("exponent", [-90, -60, 60, 100])
@pytest.mark.parametrize("name", [n for n in VARIANTS if n != "fp16"])
def test_the_size_of_the_values_does_not_matter(codec, exponent):
    rows = normal_rows()
    factor = 2.0**exponent
    assert torch.equal(roundtrip(codec, rows * factor), roundtrip(codec, rows) * factor)


def test_the_smallest_values_never_arrive_as_nan_or_larger(codec):
    # [1, 7] times each value of a column: float32's smallest, subnormal and small normal numbers.
    magnitudes = torch.tensor([1e-45, 3e-44, 1e-40, 1.2e-38, 1e-36, 1e-31, 1e-25])
    rows = magnitudes[:, None] * torch.linspace(-1, 1, 32)
    decoded = roundtrip(codec, rows, (1,) * 7)
    assert decoded.isfinite().all()
    assert (decoded.abs() <= rows.abs().amax(1, keepdim=True) * 17 / 16 + 1e-44).all()
    for dtype in (torch.bfloat16, torch.float16):
        smallest = torch.full((1, 32), torch.finfo(dtype).smallest_normal).to(dtype) / 4
        assert (smallest > 0).all()
        decoded = roundtrip(codec, smallest)
        assert ((decoded >= 0) & (decoded <= smallest * 65 / 64)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_values_arrive_finite(name, codec, dtype):
    largest = torch.finfo(dtype).max
    if name.startswith("rq") and dtype == torch.float32:
        largest *= 1 - 2**-20  # a code times its step may round up
    rows = torch.tensor([[largest] * 8, [-largest] * 4 + [largest] * 4]).to(dtype)
    for _, num_bits in (pair for pair in VARIANTS_AND_BITS if pair[0] == name):
        assert roundtrip(codec, rows, num_bits=num_bits).isfinite().all()


def test_an_outlier_spoils_only_what_shares_its_scale(name, codec):
    rows = normal_rows()
    before = roundtrip(codec, rows, SEGMENT_ROWS)
    rows[7, 0] = 1000.0
    after = roundtrip(codec, rows, SEGMENT_ROWS)
    assert torch.equal(after[:5], before[:5])
    if codec.is_segment_wide:
        assert sqnr(rows[8:], after[8:]) < 5
    else:
        assert torch.equal(after[8:], before[8:])
        if name == "gaussian":  # 2.7 times the root mean square, which is 1000 / 16
            assert 150 < after[7, 0] < 190
        else:
            assert abs(after[7, 0] - 1000) <= 1000 / 8
    block = {"identity": 1, "bf16": 1, "fp16": 1, "fp8": 128, "mxfp8": 32}.get(name)
    if block:
        assert torch.equal(after[7, block:], before[7, block:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 17, 255])
def test_non_finite_values_never_arrive_finite(name, codec, bad, dtype, column):
    rows = normal_rows(dtype)
    before = roundtrip(codec, rows, SEGMENT_ROWS)
    rows[2, column] = bad
    after = roundtrip(codec, rows, SEGMENT_ROWS)
    assert not after[2, column].isfinite()
    assert torch.equal(after[5:], before[5:])  # another destination
    if codec.is_segment_wide:
        assert after[:5].isnan().all()
        return
    assert torch.equal(after[:2], before[:2])
    assert torch.equal(after[3:5], before[3:5])
    block = {"identity": 1, "bf16": 1, "fp16": 1, "fp8": 128, "mxfp8": 32}.get(name, 256)
    columns = torch.arange(256)
    same_block = columns // block == column // block
    assert not after[2, same_block].isfinite().any()
    assert torch.equal(after[2, ~same_block], before[2, ~same_block])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_nothing_finite(codec, dtype):
    rows = torch.tensor([math.nan, math.inf, -math.inf, -math.nan]).repeat(2, 8).to(dtype)
    assert not roundtrip(codec, rows).isfinite().any()


@pytest.mark.parametrize(("name", "num_bits"), VARIANTS_AND_BITS)
def test_unbiased_or_deterministic(name, num_bits):
    """z-test of the mean of many draws against x, for every value of a row with an outlier."""
    draws = 10000 if name in RANDOM_VARIANTS else 10
    x = torch.cat((torch.linspace(-1, 1, 29), torch.tensor([3.0, 0.0, 1e-3])))
    decoded = roundtrip(VARIANTS[name], x.repeat(draws, 1), num_bits=num_bits).double()
    if name not in RANDOM_VARIANTS:
        assert torch.equal(decoded, decoded[:1].expand(draws, -1))
        return
    error = (decoded.mean(0) - x).abs()
    # 16 random bits and float32 resolve a step, at most 3, to about 2^-16.
    assert (error <= 4.5 * decoded.std(0) / draws**0.5 + 3 * 2**-15).all()
    if name == "dithered":
        # Uniform within half a step, whatever the value.
        step = 2 * 3 / (2**num_bits - 1)
        variance = (decoded - x).square().mean(0) / (step**2 / 12)
        assert ((variance - 1).abs() < 4.5 * (0.8 / draws) ** 0.5).all()
        assert ((decoded - x).abs() <= step * 0.50001).all()
    else:
        assert (decoded[:, [29, 30]] == x[[29, 30]]).all()
    assert (decoded.std(0) > 0).any()


@pytest.mark.parametrize("name", sorted(RANDOM_VARIANTS))
def test_rows_of_one_message_are_rounded_independently(name):
    rows = torch.full((400, 64), 0.3)
    rows[:, 0] = 1
    errors = roundtrip(VARIANTS[name], rows, num_bits=3)[:, 1:].double() - 0.3
    normed = (errors - errors.mean()) / errors.std()
    for other in (normed.roll(1, 0), normed.roll(1, 1)):
        assert abs((normed * other).mean()) < 4.5 / normed.numel() ** 0.5


def test_empty(codec):
    assert roundtrip(codec, torch.empty(0, 64), (0, 0, 0)).shape == (0, 64)
    assert plan(codec, torch.empty(0, 64), (0, 0, 0)).segments == ()


def test_same_seed_same_bytes(name, codec):
    rows = normal_rows()
    packet = plan(codec, rows, num_bits=4)
    first = packet.encode(rows, [], RANDOM)
    assert torch.equal(first, packet.encode(rows.clone(), [], RANDOM))
    for field in ("key", "offset", "stream"):
        other = packet.encode(rows, [], replace(RANDOM, **{field: 99}))
        assert torch.equal(first, other) == (name not in RANDOM_VARIANTS)


@given(
    name=st.sampled_from([n for n, c in VARIANTS.items() if not c.is_segment_wide]),
    segment_rows=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    num_pieces=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_pieces_and_segments_do_not_change_the_rows(name, segment_rows, num_pieces):
    rows = normal_rows(hidden=24, num_rows=sum(segment_rows))
    whole = roundtrip(VARIANTS[name], rows)
    assert torch.equal(roundtrip(VARIANTS[name], rows, segment_rows, num_pieces=num_pieces), whole)


@pytest.mark.parametrize("name", [n for n, c in VARIANTS.items() if c.num_bits_range])
def test_mixed_bits_in_one_packet_equal_separate_packets(name):
    codec, rows, segment_rows = VARIANTS[name], normal_rows(hidden=40), (3, 4, 0, 2, 7)
    bits = tuple(min(b, all_bits(codec)[-1]) for b in (7, 3, 8, 7, 4))
    mixed = plan(codec, rows, segment_rows, bits)
    segments = mixed.encode(rows, [], RANDOM).split(mixed.layout.byte_splits)
    decoded = roundtrip(codec, rows, segment_rows, bits)
    first = 0
    for rank, (num_rows, num_bits) in enumerate(zip(segment_rows, bits, strict=True)):
        alone = plan(codec, rows, segment_rows, num_bits)
        message = alone.encode(rows, [], RANDOM)
        assert torch.equal(segments[rank], message.split(alone.layout.byte_splits)[rank])
        own = slice(first, first + num_rows)
        assert torch.equal(decoded[own], roundtrip(codec, rows, segment_rows, num_bits)[own])
        first += num_rows
