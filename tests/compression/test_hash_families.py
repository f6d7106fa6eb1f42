from typing import get_args

import pytest
import torch

from megatron_moe_comp.compression.hash_families import HASHES, CrossPolytope
from megatron_moe_comp.ops.lsh_hash import HASH_BITS, own_keys
from megatron_moe_comp.options.lsh_options import HashFamily

FAMILIES = [name for name in HASHES if name != "random"]  # whose keys are fast-cross-polytope's
HIDDEN = 24
HASH_DIM = {"spherical": 4}
NUM_HASHES = 8


def make_hash(family, hidden=HIDDEN, seed=3, layer=2):
    dim = HASH_DIM.get(family, 8)
    return HASHES[family](hidden, NUM_HASHES * dim, dim, seed=seed, layer=layer)


def keys(family, rows, num_hashes=3, **kwargs):
    coordinates = num_hashes * HASH_DIM.get(family, 8)
    return make_hash(family, rows.shape[1], **kwargs).keys(rows, coordinates)


def normal_rows(num_rows, hidden=HIDDEN, seed=0):
    return torch.randn(num_rows, hidden, generator=torch.Generator().manual_seed(seed))


def test_names():
    assert set(HASHES) == set(get_args(HashFamily))


@pytest.mark.parametrize("family", HASHES)
def test_keys_follow_from_seed_and_layer(family):
    rows = normal_rows(64)
    expected = keys(family, rows)
    assert torch.equal(expected, keys(family, rows))
    for other in ({"seed": 4}, {"layer": 3}, {"seed": 2, "layer": 3}, {"seed": 2**32 - 1}):
        assert (keys(family, rows, **other) == expected).float().mean() < 0.1
    assert expected.dtype == torch.int64
    assert expected.min() >= 0
    assert expected.max() < 1 << HASH_BITS


@pytest.mark.parametrize("family", FAMILIES)
def test_near_rows_share_a_key_and_others_do_not(family):
    rows, noise = normal_rows(1000), normal_rows(1000, seed=1)
    near = rows + 0.05 * noise * (rows.norm(dim=1) / noise.norm(dim=1))[:, None]
    found = keys(family, rows)
    assert torch.equal(found, keys(family, rows.clone()))
    shared = (found == keys(family, near)).float().mean()
    independent = (found == keys(family, normal_rows(1000, seed=2))).float().mean()
    assert shared > 0.5
    assert independent < 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_opposite_rows_have_different_keys(family):
    rows = normal_rows(50)
    assert (keys(family, rows, 1) != keys(family, -rows, 1)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_more_hash_functions_divide_clusters(family):
    rows = normal_rows(500)
    coarser = keys(family, rows, 1)
    for number in range(2, NUM_HASHES + 1):
        finer = keys(family, rows, number)
        # Rows that share the key of more hash functions share that of fewer.
        pairs = torch.stack((coarser, finer), dim=1).unique(dim=0)
        assert len(pairs) == len(finer.unique())
        assert len(finer.unique()) >= len(coarser.unique())
        coarser = finer
    assert len(coarser.unique()) > 400


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scale", [2.0**-20, 0.5, 2.0**20])
def test_keys_do_not_depend_on_the_scale(family, scale):
    rows = normal_rows(200)
    assert torch.equal(keys(family, scale * rows), keys(family, rows))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keys_are_those_of_float32(family, dtype):
    rows = normal_rows(200).to(dtype)
    assert torch.equal(keys(family, rows), keys(family, rows.float()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hidden", [1, 2, 7, 8, 33, 100])
def test_any_hidden_size(family, hidden):
    rows = normal_rows(40, hidden)
    finest = keys(family, rows, NUM_HASHES)
    assert finest.shape == (40,)
    assert len(finest.unique()) >= {1: 2, 2: 4}.get(hidden, 20)
    assert len(keys(family, rows[:0], 1)) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_are_not_finite_have_keys_of_their_own(family):
    rows = normal_rows(1).repeat(4, 1)
    rows[1, 3], rows[2, 0] = torch.nan, -torch.inf
    found = keys(family, rows)
    assert torch.equal(found[1:3], own_keys(4, rows.device)[1:3])
    assert found[0] == found[3] < 1 << HASH_BITS


def test_rotations_keep_lengths_and_inner_products():
    signs = make_hash("fast-cross-polytope", 100)._rotation
    assert signs.shape == (1, 3, 128)
    assert torch.equal(signs.abs(), torch.ones_like(signs))
    assert signs.mean().abs() < 0.2


def test_dense_directions_are_nearly_normal():
    directions = CrossPolytope(256, 128, 16, seed=1, layer=1)._rotation.double()
    assert directions.shape == (256, 128)
    deviation = 65536 * (8 / 12) ** 0.5  # of a sum of eight uniform numbers
    values = directions / deviation
    assert values.mean().abs() < 0.02
    assert (values.square().mean() - 1).abs() < 0.03
    assert values.pow(3).mean().abs() < 0.06
    # Three less 1.2 / 8, the kurtosis of such a sum.
    assert (values.pow(4).mean() - 2.85).abs() < 0.12
    correlation = torch.corrcoef(values.T).fill_diagonal_(0)
    assert correlation.abs().max() < 0.4
    assert correlation.square().mean() * 256 < 1.1


GOLDEN = {
    "fast-cross-polytope": [
        "8962d57553b5",
        "feaf99863eb8",
        "bf85457977da",
        "0b9254a0a8ed",
        "8fa36a8d2030",
    ],
    "cross-polytope": [
        "f535c30a94ef",
        "8a98ecae7c7f",
        "e03c17233d51",
        "7fb984ebfe74",
        "494a5f4942a9",
    ],
    "spherical": ["466ba4695b62", "56ec023948f2", "59402edadc43", "b34854e0516e", "68bef5ab3c67"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_keys_in_every_version(family):
    """Else a training that is resumed with a newer version would cluster other rows."""
    rows = (torch.arange(5 * HIDDEN) * 37 % 101 - 50).view(5, HIDDEN).float()
    assert [f"{key:012x}" for key in keys(family, rows).tolist()] == GOLDEN[family]
