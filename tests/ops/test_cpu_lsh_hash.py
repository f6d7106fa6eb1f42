"""The C++ kernels of the hashes against the references, with every instruction set."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_comp import ops
from megatron_moe_comp.ops.lsh_hash import _dense_reference, _hadamard_reference, padded_size

HASHES = {
    "hadamard": (ops.hadamard_hash, _hadamard_reference),
    "dense": (ops.dense_hash, _dense_reference),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
each_hash = pytest.mark.parametrize("name", HASHES)

if not ops.is_compiled("cpu"):
    pytest.skip("the C++ kernels are not built: run scripts/setup.sh", allow_module_level=True)


def rotation_of(name, hidden, num_coordinates, generator):
    if name == "dense":
        return torch.randn(hidden, num_coordinates + 3, generator=generator)
    size = padded_size(hidden)
    shape = (-(-num_coordinates // size), 3, size)
    return torch.randint(0, 2, shape, generator=generator) * 2.0 - 1


def assert_same_keys(name, rows, rotation, num_coordinates, block_size):
    compiled, reference = HASHES[name]
    keys = compiled(rows, rotation, num_coordinates, block_size)
    expected = reference(rows, rotation, num_coordinates, block_size)
    wrong = (keys != expected).nonzero().flatten()
    assert not len(wrong), f"{len(wrong)} of {len(rows)} keys, the first of row {int(wrong[0])}"


@each_hash
@given(
    hidden=st.one_of(st.integers(1, 300), st.sampled_from([512, 768, 1024, 2048])),
    num_rows=st.integers(0, 13),
    num_coordinates=st.integers(1, 300),
    block_size=st.integers(1, 310),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.sampled_from([1e-42, 1.0, 1e4, 1e37]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_same_keys_as_the_reference(
    isa, name, hidden, num_rows, num_coordinates, block_size, dtype, magnitude, seed
):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, hidden, generator=generator).mul(magnitude).to(dtype)
    rotation = rotation_of(name, hidden, num_coordinates, generator)
    assert_same_keys(name, rows, rotation, num_coordinates, block_size)


@each_hash
@pytest.mark.parametrize("hidden", [1, 2, 3, 4, 7, 8, 16, 31, 32, 64, 128, 257])
def test_coordinates_of_equal_magnitude(isa, name, hidden):
    """Of each sign, where the first one counts."""
    generator = torch.Generator().manual_seed(hidden)
    rows = torch.randint(-1, 2, (50, hidden), generator=generator).float()
    for num_coordinates, block_size in ((1, 1), (5, 2), (96, 16), (96, 96), (70, 9)):
        rotation = rotation_of(name, hidden, num_coordinates, generator).sign()
        assert_same_keys(name, rows, rotation, num_coordinates, block_size)


@each_hash
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_rows(isa, name, dtype):
    rows = torch.randn(12, 40, generator=torch.Generator().manual_seed(0))
    rows[0], rows[1], rows[2] = 0.0, -0.0, 1.0
    specials = (torch.nan, -torch.nan, torch.inf, -torch.inf, 3e38, 65504.0, 1e-45)
    for row, value in enumerate(specials, start=4):
        rows[row, row] = value
    rotation = rotation_of(name, 40, 96, torch.Generator().manual_seed(1))
    for num_coordinates in (3, 96):
        assert_same_keys(name, rows.to(dtype), rotation, num_coordinates, 16)


@each_hash
def test_any_number_of_threads_gives_the_same_keys(isa, name):
    rows = torch.randn(2001, 200)
    rows[::37] = torch.nan
    rotation = rotation_of(name, 200, 96, torch.Generator().manual_seed(2))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_same_keys(name, rows, rotation, 96, 16)
    finally:
        torch.set_num_threads(threads)


ROWS, SIGNS, DIRECTIONS = torch.zeros(4, 12), torch.ones(2, 3, 16), torch.ones(12, 20)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rows": torch.zeros(4, 24)[:, ::2]}, "rows must be contiguous"),
        ({"rows": ROWS.int()}, "floating-point"),
        ({"rows": ROWS[0]}, "rows must be"),
        ({"num_coordinates": 0}, "num_coordinates"),
        ({"num_coordinates": 33}, "num_coordinates"),
        ({"block_size": 0}, "block_size"),
    ],
)
def test_wrong_arguments_do_not_reach_the_rows(change, named):
    """Without the checks in Python."""
    for op, rotation in (
        ("hadamard_hash", ("signs", SIGNS)),
        ("dense_hash", ("directions", DIRECTIONS)),
    ):
        arguments = {"rows": ROWS, rotation[0]: rotation[1], "num_coordinates": 8, "block_size": 2}
        with pytest.raises(ValueError, match=named):
            getattr(torch.ops.megatron_moe_comp, op)(**arguments | change)


@pytest.mark.parametrize(
    "signs",
    [SIGNS[:, :2], SIGNS[:, :, :12], SIGNS[:, :, :8], SIGNS[0], SIGNS[:, :, :0], SIGNS.half()],
)
def test_wrong_signs(signs):
    with pytest.raises(ValueError, match=r"signs must be|rotation must be float32"):
        torch.ops.megatron_moe_comp.hadamard_hash(ROWS, signs, 8, 2)


@pytest.mark.parametrize("directions", [DIRECTIONS[:11], DIRECTIONS[0], DIRECTIONS.double()])
def test_wrong_directions(directions):
    with pytest.raises(ValueError, match=r"directions must have|rotation must be float32"):
        torch.ops.megatron_moe_comp.dense_hash(ROWS, directions, 8, 2)
