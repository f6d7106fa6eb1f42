import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_comp import ops
from megatron_moe_comp.ops.lsh_hash import (
    HASH_BITS,
    _dense_reference,
    _hadamard_reference,
    own_keys,
    padded_size,
)

HIDDEN = [1, 3, 8, 96, 256]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HASHES = {
    "hadamard": ops.hadamard_hash,
    "dense": ops.dense_hash,
    "hadamard-reference": _hadamard_reference,
    "dense-reference": _dense_reference,
}
each_hash = pytest.mark.parametrize("name", HASHES)


def rotation_of(name, hidden, num_coordinates, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if name.startswith("dense"):
        return torch.randn(hidden, num_coordinates, generator=generator)
    size = padded_size(hidden)
    shape = (-(-num_coordinates // size), 3, size)
    return torch.randint(0, 2, shape, generator=generator) * 2.0 - 1


def keys_of(name, rows, num_coordinates=96, block_size=16, seed=0):
    rotation = rotation_of(name, rows.shape[1], num_coordinates, seed)
    return HASHES[name](rows, rotation, num_coordinates, block_size)


def random_rows(num_rows, hidden, seed=1):
    return torch.randn(num_rows, hidden, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("hash_rows", [ops.hadamard_hash, _hadamard_reference])
def test_hadamard_example_of_the_docstring(hash_rows):
    signs = torch.ones(1, 3, 4)
    signs[0, 0] = torch.tensor([1, -1, 1, -1])
    assert hash_rows(torch.tensor([[2.0, -5, 1]]), signs, 4, 2).tolist() == [0xD5F0B44D31AC]


@pytest.mark.parametrize("hash_rows", [ops.dense_hash, _dense_reference])
def test_dense_example_of_the_docstring(hash_rows):
    rows = torch.tensor([[2.0, -5, 1]])
    assert hash_rows(rows, torch.eye(3), 3, 2).tolist() == [0xCDB5FC09D061]


def key_of(coordinates, block_size):
    """The key of coordinates, in Python integers."""
    key = 0x9E3779B97F4A7C15
    for start in range(0, len(coordinates), block_size):
        block = list(coordinates[start : start + block_size])
        largest = max(range(len(block)), key=lambda i: abs(block[i]))  # the first of several
        key = (key ^ 2 * largest + (block[largest] < 0)) * 0xFF51AFD7ED558CCD % 2**64
        key ^= key >> 32
    return key >> 16


def transform_matrix(size):
    """H[i, j] = 1 or -1 by the parity of the common bits of i and j."""
    common = np.arange(size)[:, None] & np.arange(size)
    return 1 - 2 * np.vectorize(lambda bits: bits.bit_count() % 2)(common)


@each_hash
@given(
    hidden=st.integers(1, 40),
    num_coordinates=st.integers(1, 150),
    block_size=st.integers(1, 160),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_keys_of_exact_coordinates(name, hidden, num_coordinates, block_size, seed):
    """Small integers, which no operation rounds, through matrices instead of a transform."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-3, 4, (4, hidden), generator=generator)
    rotation = rotation_of(name, hidden, num_coordinates, seed).sign()
    if name.startswith("dense"):
        coordinates = rows.numpy() @ rotation.long().numpy()
    else:
        matrix = transform_matrix(rotation.shape[2])
        padded = np.pad(rows.numpy(), ((0, 0), (0, len(matrix) - hidden)))
        coordinates = [
            ((padded * d1 @ matrix) * d2 @ matrix) * d3 @ matrix
            for d1, d2, d3 in rotation.long().numpy()
        ]
        coordinates = np.concatenate(coordinates, axis=1)
    keys = HASHES[name](rows.float(), rotation, num_coordinates, block_size)
    expected = [key_of(row[:num_coordinates].tolist(), block_size) for row in coordinates]
    assert keys.tolist() == expected


@each_hash
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_shape_and_range(name, hidden, dtype):
    for num_rows in (0, 1, 7):
        rows = random_rows(num_rows, hidden).to(dtype)
        keys = keys_of(name, rows)
        assert keys.dtype == torch.int64
        assert keys.shape == (num_rows,)
        assert ((keys >= 0) & (keys < 1 << HASH_BITS)).all()
        assert torch.equal(keys, keys_of(name, rows.float()))


@each_hash
@pytest.mark.parametrize("hidden", HIDDEN)
def test_only_the_row_itself_counts(name, hidden):
    rows = random_rows(9, hidden)
    order = torch.tensor([4, 4, 0, 8, 1])
    assert torch.equal(keys_of(name, rows[order]), keys_of(name, rows)[order])


@each_hash
def test_equal_rows_share_a_key_and_others_do_not(name):
    rows = random_rows(50, 96)
    keys = keys_of(name, rows)
    assert len(keys.unique()) == 50
    assert len(keys_of(name, rows[:1].repeat(20, 1)).unique()) == 1
    # The side of the coordinates counts, their length does not.
    assert torch.equal(keys_of(name, rows * 8), keys)
    assert not (keys_of(name, -rows) == keys).any()
    assert not (keys_of(name, rows, seed=1) == keys).any()


@each_hash
def test_the_nearer_a_row_the_more_often_its_key_is_the_same(name):
    rows = random_rows(1000, 64)
    noise = random_rows(1000, 64, seed=2)
    same = [
        (keys_of(name, rows, 16, 8) == keys_of(name, rows + step * noise, 16, 8)).sum().item()
        for step in (0.01, 0.1, 0.5, 10)
    ]
    assert same[0] > 950
    assert same == sorted(same, reverse=True)
    assert same[3] < 50


@each_hash
def test_padding_is_zeros(name):
    rows = random_rows(5, 40)
    padded = torch.nn.functional.pad(rows, (0, 24))
    rotation = rotation_of(name, 64, 96)
    kept = rotation[:40] if name.startswith("dense") else rotation
    keys = HASHES[name](rows, kept, 96, 16)
    assert torch.equal(HASHES[name](padded, rotation, 96, 16), keys)


@each_hash
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_rows_that_are_not_finite_get_their_own_keys(name, value):
    """So do rows whose coordinates overflow."""
    rows = random_rows(40, 128)
    expected = keys_of(name, rows)
    for row in (0, 17, 39):
        rows[row] = value
        expected[row] = own_keys(40, rows.device)[row]
    assert torch.equal(keys_of(name, rows), expected)


@pytest.mark.parametrize("hash_rows", [ops.dense_hash, _dense_reference])
def test_only_the_coordinates_in_use_must_be_finite(hash_rows):
    directions = torch.eye(8)
    directions[7, 7] = torch.inf
    rows = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8]])
    assert hash_rows(rows, directions, 7, 4) < 1 << HASH_BITS
    assert hash_rows(rows, directions, 8, 4) == 1 << HASH_BITS


@each_hash
def test_the_sign_of_zero_does_not_count(name):
    rows = torch.zeros(3, 24)
    rows[1] = -0.0
    rows[2, ::2] = -0.0
    assert len(keys_of(name, rows).unique()) == 1
    assert keys_of(name, rows)[0] == key_of([0.0] * 96, 16)


@pytest.mark.parametrize("name", ["hadamard", "dense"])
def test_strides_do_not_count(name):
    rows, rotation = random_rows(6, 32), rotation_of(name, 32, 96)
    keys = HASHES[name](rows, rotation, 96, 16)
    strided = rotation.transpose(0, -1).contiguous().transpose(0, -1)
    assert not strided.is_contiguous()
    assert torch.equal(HASHES[name](rows.repeat(1, 2)[:, :32], strided, 96, 16), keys)
    assert torch.equal(HASHES[name](rows.clone().requires_grad_(), rotation, 96, 16), keys)


ROWS, SIGNS, DIRECTIONS = torch.zeros(4, 12), torch.ones(2, 3, 16), torch.ones(12, 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ROWS.long(), SIGNS, 8, 2), "rows must be a matrix of floats, not torch.int64"),
        ((ROWS[0], SIGNS, 8, 2), "signs must be"),
        ((ROWS, SIGNS[:, :2], 8, 2), r"signs must be \[rotations, 3, 16\], not \[2, 2, 16\]"),
        ((ROWS, SIGNS[:, :, :8], 8, 2), r"signs must be \[rotations, 3, 16\]"),
        ((ROWS, SIGNS[0], 8, 2), r"signs must be \[rotations, 3, 16\]"),
        ((ROWS, SIGNS.double(), 8, 2), "the rotation must be float32 on cpu, not torch.float64"),
        ((ROWS, SIGNS, 0, 2), "num_coordinates must be 1 to 32, not 0"),
        ((ROWS, SIGNS, 33, 2), "num_coordinates must be 1 to 32, not 33"),
        ((ROWS, SIGNS, 8, 0), "block_size must be at least 1, not 0"),
    ],
)
def test_hadamard_hash_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.hadamard_hash(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ROWS.long(), DIRECTIONS, 8, 2), "rows must be a matrix of floats, not torch.int64"),
        ((ROWS, DIRECTIONS[:11], 8, 2), r"a row per column of \[4, 12\], not be \[11, 20\]"),
        ((ROWS, DIRECTIONS[0], 8, 2), "directions must have a row per column"),
        ((ROWS[0], DIRECTIONS, 8, 2), "directions must have a row per column"),
        ((ROWS, DIRECTIONS.half(), 8, 2), "the rotation must be float32 on cpu"),
        ((ROWS, DIRECTIONS, 21, 2), "num_coordinates must be 1 to 20, not 21"),
        ((ROWS, DIRECTIONS, 8, -1), "block_size must be at least 1, not -1"),
    ],
)
def test_dense_hash_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.dense_hash(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    rows = random_rows(5, 12).to(dtype)
    hashes = torch.ops.megatron_moe_comp
    torch.library.opcheck(hashes.hadamard_hash, (rows, SIGNS, 20, 8))
    torch.library.opcheck(hashes.dense_hash, (rows, DIRECTIONS, 20, 8))
