"""hadamard_hash and dense_hash: the keys of rows under locality-sensitive hashing.

Both turn a row into rotated coordinates and hash these block by block: the code of a block is the
coordinate of largest magnitude and its sign (cross-polytope hashing: Terasawa, Tanaka, WADS 2007;
Andoni et al., NeurIPS 2015), which for blocks of one coordinate is the side of a hyperplane. A key
mixes the codes of all blocks. Every float32 operation has a fixed place in a fixed order and rounds
once, so every kernel gives the same keys.

Shapes: N rows, H columns, P the power of two from H on, L coordinates.
"""

import torch

HASH_BITS = 48
"""A hashed row's key is below 2^48; a row with a coordinate that is not finite has 2^48 + its
number, which no other row has."""

_START = -0x61C8864680B583EB  # 0x9e3779b97f4a7c15 as a signed number
_MULTIPLIER = -0x00AE502812AA7333  # 0xff51afd7ed558ccd


def own_keys(num_rows: int, device: torch.device) -> torch.Tensor:
    """Returns for each row the key that only this row has, int64 [N]."""
    return torch.arange(num_rows, device=device) + (1 << HASH_BITS)


def padded_size(hidden_size: int) -> int:
    """Returns P, the columns of a row as it is transformed: the power of two from H on."""
    return 1 << (hidden_size - 1).bit_length()


def _keys(coordinates: torch.Tensor, block_size: int) -> torch.Tensor:
    """Returns the keys of rotated rows, float32 [N, L]; the last block may be shorter."""
    keys = torch.full_like(coordinates[:, 0], _START, dtype=torch.int64)
    for block in coordinates.split(block_size, dim=1):
        largest = block.abs().argmax(dim=1, keepdim=True)  # the first of several
        code = 2 * largest + (block.gather(1, largest) < 0)
        keys = (keys ^ code[:, 0]) * _MULTIPLIER
        keys ^= keys >> 32 & 0xFFFFFFFF
    keys = keys >> (64 - HASH_BITS) & (1 << HASH_BITS) - 1
    finite = coordinates.isfinite().all(dim=1)
    return torch.where(finite, keys, own_keys(len(keys), keys.device))


def walsh_hadamard(values: torch.Tensor) -> torch.Tensor:
    """Returns the Walsh-Hadamard transform of each row, [N, P] with P a power of two, unscaled."""
    shape, half = values.shape, 1
    while half < shape[1]:
        pairs = values.view(shape[0], shape[1] // (2 * half), 2, half)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        values = torch.stack((first + second, first - second), dim=2).view(shape)
        half *= 2
    return values


def _hadamard_reference(
    rows: torch.Tensor, signs: torch.Tensor, num_coordinates: int, block_size: int
) -> torch.Tensor:
    padded = torch.nn.functional.pad(rows.float(), (0, signs.shape[2] - rows.shape[1]))
    parts = []
    for rotation in signs[: -(-num_coordinates // signs.shape[2])]:
        rotated = padded
        for diagonal in rotation:
            rotated = walsh_hadamard(rotated * diagonal)
        parts.append(rotated)
    return _keys(torch.cat(parts, dim=1)[:, :num_coordinates], block_size)


def _dense_reference(
    rows: torch.Tensor, directions: torch.Tensor, num_coordinates: int, block_size: int
) -> torch.Tensor:
    values = rows.float()
    coordinates = values.new_zeros(len(values), num_coordinates)
    for column, direction in enumerate(directions[:, :num_coordinates]):
        coordinates = coordinates + values[:, column, None] * direction
    return _keys(coordinates, block_size)


def _fake(
    rows: torch.Tensor, rotation: torch.Tensor, num_coordinates: int, block_size: int
) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], dtype=torch.int64)


for _name, _rotation, _reference in (
    ("hadamard_hash", "signs", _hadamard_reference),
    ("dense_hash", "directions", _dense_reference),
):
    _schema = f"(Tensor rows, Tensor {_rotation}, int num_coordinates, int block_size) -> Tensor"
    torch.library.define(f"megatron_moe_comp::{_name}", _schema)
    torch.library.impl(f"megatron_moe_comp::{_name}", "CompositeExplicitAutograd")(_reference)
    torch.library.register_fake(f"megatron_moe_comp::{_name}")(_fake)


def _check(
    rows: torch.Tensor, rotation: torch.Tensor, available: int, num_coordinates: int, block: int
) -> None:
    if rows.dim() != 2 or not rows.is_floating_point():
        raise ValueError(f"rows must be a matrix of floats, not {rows.dtype} {list(rows.shape)}")
    if rotation.dtype != torch.float32 or rotation.device != rows.device:
        raise ValueError(
            f"the rotation must be float32 on {rows.device}, not {rotation.dtype} on "
            f"{rotation.device}"
        )
    if not 1 <= num_coordinates <= available:
        raise ValueError(f"num_coordinates must be 1 to {available}, not {num_coordinates}")
    if block < 1:
        raise ValueError(f"block_size must be at least 1, not {block}")


def hadamard_hash(
    rows: torch.Tensor, signs: torch.Tensor, num_coordinates: int, block_size: int
) -> torch.Tensor:
    """Returns the keys of rows under Walsh-Hadamard pseudo-rotations H D3 H D2 H D1, int64 [N].

    O(P log P) per rotation (Andoni et al., NeurIPS 2015, section 6). Coordinate j is coordinate
    j % P of rotation j // P.

    Args:
        rows: [N, H] of any floating-point dtype; wider ones than float32 are rounded to it.
        signs: float32 [rotations, 3, P] of 1 and -1, the diagonals D1, D2, D3.
        num_coordinates: L, 1 to rotations * P.
        block_size: coordinates that share one code; the last block may have fewer.

    Raises:
        ValueError: a shape, dtype or number does not fit.
    """
    size = padded_size(rows.shape[1]) if rows.dim() == 2 else 0
    if signs.dim() != 3 or signs.shape[1:] != (3, size):
        raise ValueError(f"signs must be [rotations, 3, {size}], not {list(signs.shape)}")
    _check(rows, signs, len(signs) * size, num_coordinates, block_size)
    return torch.ops.megatron_moe_comp.hadamard_hash(
        rows.detach().contiguous(), signs, num_coordinates, block_size
    )


def dense_hash(
    rows: torch.Tensor, directions: torch.Tensor, num_coordinates: int, block_size: int
) -> torch.Tensor:
    """Returns the keys of rows under a dense random projection, int64 [N].

    Coordinate j is the sum over columns k, in their order, of rows[:, k] * directions[k, j].

    Args:
        rows: [N, H] of any floating-point dtype; wider ones than float32 are rounded to it.
        directions: float32 [H, at least L].
        num_coordinates: L, the first columns of `directions` that are used.
        block_size: coordinates that share one code; the last block may have fewer.

    Raises:
        ValueError: a shape, dtype or number does not fit.
    """
    if directions.dim() != 2 or rows.dim() != 2 or len(directions) != rows.shape[1]:
        raise ValueError(
            f"directions must have a row per column of {list(rows.shape)}, not be "
            f"{list(directions.shape)}"
        )
    _check(rows, directions, directions.shape[1], num_coordinates, block_size)
    return torch.ops.megatron_moe_comp.dense_hash(
        rows.detach().contiguous(), directions, num_coordinates, block_size
    )
