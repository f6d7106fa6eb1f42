"""Every codec: round trip, error floor, byte count, special rows, determinism."""

import math

import pytest
import torch

from megatron_moe_comp.compression.codec import RowFormat
from megatron_moe_comp.compression.codecs import CODECS
from megatron_moe_comp.compression.codecs.identity import Identity
from megatron_moe_comp.compression.codecs.rq import RandomQuantization
from megatron_moe_comp.compression.payload import PayloadLayout
from megatron_moe_comp.compression.random_stream import RandomStream

RANDOM = RandomStream(key=1, offset=2, stream=3)
VARIANTS = {
    "identity": Identity(),
    "rq-row": RandomQuantization(scale_per="row"),
    "rq-chunk": RandomQuantization(scale_per="chunk"),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEGMENT_ROWS = (5, 0, 11)


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def codec(request):
    return request.param


def roundtrip(codec, rows, segment_rows=SEGMENT_ROWS, num_bits=6, random=RANDOM):
    """Through the payload too, as on the wire."""
    row_format = RowFormat(rows.shape[1], rows.dtype, num_bits)
    parts = codec.encode(rows, segment_rows, row_format, random)
    layout = PayloadLayout(codec.sections(row_format), segment_rows)
    parts = layout.unpack(layout.pack(parts))
    return codec.decode(parts, segment_rows, row_format)


def normal_rows(dtype=torch.float32, hidden=256):
    return torch.randn(16, hidden, generator=torch.Generator().manual_seed(0)).to(dtype)


def sqnr(rows, decoded):
    rows, decoded = rows.double(), decoded.double()
    return 10 * torch.log10(rows.square().sum() / (rows - decoded).square().sum()).item()


def test_every_codec_is_tested():
    assert {codec.name for codec in VARIANTS.values()} == set(CODECS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shape_dtype_and_sections(codec, dtype):
    rows = normal_rows(dtype)
    row_format = RowFormat(256, dtype, 6)
    sections = codec.sections(row_format)
    parts = codec.encode(rows, SEGMENT_ROWS, row_format, RANDOM)
    for section, part in zip(sections, parts, strict=True):
        per_row = (16, section.row_bytes)
        assert part.shape == (per_row if section.row_bytes else (3, section.segment_bytes))
        assert part.dtype == torch.uint8
        assert part.is_contiguous()
    decoded = roundtrip(codec, rows)
    assert decoded.shape == rows.shape
    assert decoded.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_identity_is_exact(dtype):
    rows = normal_rows(dtype)
    rows[0, :4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    assert torch.equal(roundtrip(Identity(), rows).view(torch.uint8), rows.view(torch.uint8))


# Measured on 256 normal values a row, less 0.5 dB; about 6 dB a bit.
FLOORS = {2: -2.5, 3: 7.0, 4: 14.5, 5: 21.0, 6: 27.3, 7: 33.4, 8: 39.5}


@pytest.mark.parametrize("num_bits", FLOORS)
def test_sqnr_floor(num_bits):
    rows = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    decoded = roundtrip(VARIANTS["rq-row"], rows, (512,), num_bits)
    assert FLOORS[num_bits] < sqnr(rows, decoded) < FLOORS[num_bits] + 1.5


def test_an_outlier_spoils_only_its_row_or_chunk():
    rows = normal_rows()
    rows[7, 0] = 100.0
    by_row = roundtrip(VARIANTS["rq-row"], rows)
    assert sqnr(rows[8:], by_row[8:]) > 27
    by_chunk = roundtrip(VARIANTS["rq-chunk"], rows)
    assert sqnr(rows[8:], by_chunk[8:]) < 5
    assert sqnr(rows[:5], by_chunk[:5]) > 25


@pytest.mark.parametrize("num_bits", FLOORS)
def test_bytes_per_row(num_bits):
    for hidden in (8, 256, 1000):
        row_format = RowFormat(hidden, torch.bfloat16, num_bits)
        row = sum(s.row_bytes for s in VARIANTS["rq-row"].sections(row_format))
        assert row == hidden * num_bits // 8 + 4
        sections = VARIANTS["rq-chunk"].sections(row_format)
        assert sum(s.row_bytes for s in sections) == hidden * num_bits // 8
        assert sum(s.segment_bytes for s in sections) == 4


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -3.0])
def test_constant_rows(codec, value):
    rows = torch.full((16, 32), value)
    assert torch.equal(roundtrip(codec, rows), rows + 0.0)


def test_rows_of_zeros_among_others(codec):
    rows = normal_rows()
    rows[3] = 0
    assert (roundtrip(codec, rows)[3] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_never_arrive_finite(codec, bad, dtype):
    rows = normal_rows(dtype)
    rows[2, 17] = bad
    decoded = roundtrip(codec, rows)
    assert not decoded[2, 17].isfinite()
    assert decoded[5:].isfinite().all()  # another destination


def test_empty(codec):
    assert roundtrip(codec, torch.empty(0, 64), (0, 0, 0)).shape == (0, 64)


def test_same_seed_same_bytes(codec):
    rows = normal_rows()
    row_format = RowFormat(256, torch.float32, 4)
    first = codec.encode(rows, SEGMENT_ROWS, row_format, RANDOM)
    second = codec.encode(rows.clone(), SEGMENT_ROWS, row_format, RANDOM)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    if codec.name != "identity":
        other = codec.encode(rows, SEGMENT_ROWS, row_format, RandomStream(9, 2, 3))
        assert not torch.equal(first[0], other[0])


def test_bytes_of_zeros_have_one_sign():
    rows = torch.stack((torch.zeros(16), -torch.zeros(16)))
    codes, scales = VARIANTS["rq-row"].encode(rows, (2,), RowFormat(16, rows.dtype, 6), RANDOM)
    assert torch.equal(codes[0], codes[1])
    assert not scales.any()
