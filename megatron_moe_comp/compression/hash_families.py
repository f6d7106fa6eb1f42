"""The hash families of clustering, chosen by name: a rotation, and what it turns rows into.

A rotation follows from the seed and the layer alone. It is the same on every rank and in every run
of the seed, and no part of a checkpoint.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from megatron_moe_comp import ops
from megatron_moe_comp.ops.lsh_hash import padded_size
from megatron_moe_comp.ops.philox import random_halves


class LshHash(ABC):
    """One layer's hash functions.

    Args:
        hidden_size: columns of a row.
        max_coordinates: most coordinates that will be hashed.
        hash_dim: coordinates of one hash function.
        seed: 32-bit seed of the run.
        layer: number of the layer.
    """

    default_hash_dim: ClassVar[int] = 16
    """Coordinates of one hash function; 16 give a cross-polytope hash 32 values."""

    def __init__(
        self, hidden_size: int, max_coordinates: int, hash_dim: int, *, seed: int, layer: int
    ) -> None:
        self._hash_dim = hash_dim
        self._rotation = self._make_rotation(hidden_size, max_coordinates, seed, layer)

    @staticmethod
    @abstractmethod
    def _make_rotation(
        hidden_size: int, max_coordinates: int, seed: int, layer: int
    ) -> torch.Tensor:
        """Returns what the op needs besides rows, float32 on the CPU."""

    @abstractmethod
    def _hash(
        self, rows: torch.Tensor, rotation: torch.Tensor, num_coordinates: int
    ) -> torch.Tensor: ...

    def keys(self, rows: torch.Tensor, num_coordinates: int) -> torch.Tensor:
        """Returns the keys of rows [N, H] by their first rotated coordinates, int64 [N]."""
        if self._rotation.device != rows.device:
            self._rotation = self._rotation.to(rows.device, non_blocking=True)
        return self._hash(rows, self._rotation, num_coordinates)


class FastCrossPolytope(LshHash):
    """Cross-polytope hashing of Walsh-Hadamard pseudo-rotations, O(H log H) per row."""

    @staticmethod
    def _make_rotation(
        hidden_size: int, max_coordinates: int, seed: int, layer: int
    ) -> torch.Tensor:
        size = padded_size(hidden_size)
        num_rotations = -(-max_coordinates // size)
        bits = _random_halves(3 * num_rotations, size, seed, layer) & 1
        return 1.0 - 2.0 * bits.view(num_rotations, 3, size)

    def _hash(
        self, rows: torch.Tensor, rotation: torch.Tensor, num_coordinates: int
    ) -> torch.Tensor:
        return ops.hadamard_hash(rows, rotation, num_coordinates, self._hash_dim)


class CrossPolytope(LshHash):
    """Cross-polytope hashing of a dense random projection, O(H L) per row.

    The directions are nearly normal: sums of eight uniform numbers, which integer arithmetic makes
    the same on every machine.
    """

    @staticmethod
    def _make_rotation(
        hidden_size: int, max_coordinates: int, seed: int, layer: int
    ) -> torch.Tensor:
        halves = _random_halves(hidden_size, 8 * max_coordinates, seed, layer)
        return halves.view(hidden_size, max_coordinates, 8).sum(2).float() - 4.0 * 65535

    def _hash(
        self, rows: torch.Tensor, rotation: torch.Tensor, num_coordinates: int
    ) -> torch.Tensor:
        return ops.dense_hash(rows, rotation, num_coordinates, self._hash_dim)


class Spherical(CrossPolytope):
    """The sides of random hyperplanes that a row is on; a hash function is `hash_dim` of them."""

    default_hash_dim: ClassVar[int] = 5

    def _hash(
        self, rows: torch.Tensor, rotation: torch.Tensor, num_coordinates: int
    ) -> torch.Tensor:
        return ops.dense_hash(rows, rotation, num_coordinates, 1)


HASHES: dict[str, type[LshHash]] = {
    "fast-cross-polytope": FastCrossPolytope,
    "cross-polytope": CrossPolytope,
    "spherical": Spherical,
    "random": FastCrossPolytope,  # whose keys the clustering then shuffles
}


def _random_halves(num_rows: int, num_columns: int, seed: int, layer: int) -> torch.Tensor:
    """Returns integers below 2^16, [num_rows, num_columns]."""
    # A message's stream is that of a layer from 1 on, so none shares a number with stream 0.
    halves = random_halves(
        torch.arange(num_rows),
        -(-num_columns // 8),
        key=layer << 32 | seed,
        offset=2**32 - 1,
        stream=0,
    )
    return halves.flatten(1)[:, :num_columns]
