import pytest
import torch

from megatron_moe_comp.ops.philox import philox4x32, random_halves

# Known answers published with the Random123 library (philox4x32-10).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == expected


def test_halves_are_the_words_in_order():
    halves = random_halves(torch.tensor([5]), 2, key=7, offset=11, stream=13)
    for group in range(2):
        words = philox4x32(tuple(torch.tensor([c]) for c in (group, 5, 11, 13)), 7)
        expected = [int(w) >> shift & 0xFFFF for w in words for shift in (0, 16)]
        assert halves[0, group].tolist() == expected


def test_every_part_of_the_counter_matters():
    base = {"rows": torch.tensor([3]), "key": 1 << 33, "offset": 4, "stream": 5}
    variants = [base, base | {"rows": torch.tensor([4])}]
    variants += [base | {name: base[name] + 1} for name in ("key", "offset", "stream")]
    variants += [base | {"key": base["key"] ^ 1 << 32}]
    seen = {
        tuple(random_halves(v["rows"], 1, key=v["key"], offset=v["offset"], stream=v["stream"])
              .flatten().tolist())
        for v in variants
    }  # fmt: skip
    assert len(seen) == len(variants)


def test_halves_are_uniform_and_uncorrelated():
    halves = random_halves(torch.arange(4096), 32, key=1, offset=2, stream=3).double()
    n = halves.numel()
    mean, deviation = (2**16 - 1) / 2, 2**16 / 12**0.5
    assert abs(halves.mean() - mean) < 4.5 * deviation / n**0.5
    centred = (halves.flatten() - mean) / deviation
    assert abs((centred[1:] * centred[:-1]).mean()) < 4.5 / n**0.5
    rows = centred.view(4096, -1)
    assert abs((rows[1:] * rows[:-1]).mean()) < 4.5 / n**0.5
