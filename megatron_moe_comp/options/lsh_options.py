"""LshOptions: the knobs of clustering rows by locality-sensitive hashing, as CompressionConfig."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

from megatron_moe_comp.compression.hash_families import HASHES
from megatron_moe_comp.options.checks import flag, require_choice

HashFamily = Literal[tuple(HASHES)]
Residual = Literal["none", "identity"]
LshScope = Literal["all", "remote", "inter-node"]

DEFAULT_NUM_HASHES = 6
DEFAULT_RATE = 0.2
MAX_HASHES = 64
MAX_REFINEMENTS = 16


@dataclass(frozen=True)
class LshOptions:
    """Options of --moe-a2a-compress=lsh."""

    moe_lsh_hash: HashFamily = "fast-cross-polytope"
    """Which rows are similar. fast-cross-polytope: those with the same largest coordinates after a
    Walsh-Hadamard pseudo-rotation. cross-polytope: after a dense random projection. spherical:
    those on the same side of random hyperplanes. random: a control, clusters of the sizes of
    fast-cross-polytope's but of rows taken at random."""

    moe_lsh_num_hashes: int | None = None
    """Hash functions whose values form a row's key, 1 to 64: more make more, finer clusters
    (default: 6). Without --moe-lsh-target-rate it stays; with it, training starts from it."""

    moe_lsh_hash_dim: int | None = None
    """Coordinates of one hash function, 1 to the hidden size (default: 16; spherical: 5)."""

    moe_lsh_target_rate: float | None = None
    """Centroids per row that each layer is held at by adapting how many coordinates are hashed,
    above 0 to 1 (default: 0.2, or none with --moe-lsh-num-hashes)."""

    moe_lsh_warmup_iters: int = 0
    """Iterations in which the target rate falls from 1 to --moe-lsh-target-rate."""

    moe_lsh_refine: int | None = None
    """How often each row moves to the nearest centroid of its expert (Lloyd steps), 0 to 16
    (default: 1; with random clusters, which would not stay random: 0)."""

    moe_lsh_center: bool = False
    """Subtract the mean of an expert's rows before they are hashed."""

    moe_lsh_residual: Residual = "none"
    """What is added to an expert's output for a centroid to restore a row x of it. none: nothing.
    identity: x minus the centroid, as LSH-MoE does."""

    moe_lsh_scope: LshScope = "all"
    """Which rows are clustered: all, which makes less work of the experts, too; remote, those that
    leave their rank; inter-node, those that leave their node. The others are sent and computed one
    by one."""

    moe_lsh_eval: bool = False
    """Cluster in evaluation, too. A centroid mixes positions, later ones included, so the loss of a
    causal model then is not comparable."""

    @property
    def adapts(self) -> bool:
        """Whether anything of clustering changes during training."""
        return self.moe_lsh_target_rate is not None

    def _check_lsh(self, method: str) -> None:
        """Raises ValueError for an unusable value, or one that `method` has no use for."""
        for name, kind in (
            ("moe_lsh_hash", HashFamily),
            ("moe_lsh_residual", Residual),
            ("moe_lsh_scope", LshScope),
        ):
            require_choice(name, getattr(self, name), get_args(kind))
        for name, low, high in (
            ("moe_lsh_num_hashes", 1, MAX_HASHES),
            ("moe_lsh_hash_dim", 1, 2**15),
            ("moe_lsh_refine", 0, MAX_REFINEMENTS),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{flag(name)}={value}: out of range. Use {low} to {high}.")
        rate = self.moe_lsh_target_rate
        if rate is not None and not 0 < rate <= 1:
            raise ValueError(
                f"--moe-lsh-target-rate={rate}: a rate is centroids per row, above 0 and up to 1. "
                "Use a value such as 0.2."
            )
        if self.moe_lsh_warmup_iters < 0:
            raise ValueError(
                f"--moe-lsh-warmup-iters={self.moe_lsh_warmup_iters}: cannot be negative. Use 0 "
                "for no warm-up."
            )
        if method == "lsh":
            self._resolve_lsh()
        elif method != "none":
            self._refuse_lsh(method)

    def _resolve_lsh(self) -> None:
        """Fills in what was not given."""
        if self.moe_lsh_target_rate is None and self.moe_lsh_num_hashes is None:
            object.__setattr__(self, "moe_lsh_target_rate", DEFAULT_RATE)
        if self.moe_lsh_warmup_iters and self.moe_lsh_target_rate is None:
            raise ValueError(
                f"--moe-lsh-warmup-iters={self.moe_lsh_warmup_iters}: a fixed number of hashes has "
                "no rate to fall. Set --moe-lsh-target-rate, or drop one of the two options."
            )
        if self.moe_lsh_num_hashes is None:
            object.__setattr__(self, "moe_lsh_num_hashes", DEFAULT_NUM_HASHES)
        if self.moe_lsh_refine is None:
            object.__setattr__(self, "moe_lsh_refine", int(self.moe_lsh_hash != "random"))
        if self.moe_lsh_hash_dim is None:
            size = HASHES[self.moe_lsh_hash].default_hash_dim
            object.__setattr__(self, "moe_lsh_hash_dim", size)

    def _refuse_lsh(self, method: str) -> None:
        """Raises where an option of clustering was given to another method."""
        for field in fields(LshOptions):
            value = getattr(self, field.name)
            if value != field.default:
                raise ValueError(
                    f"{flag(field.name)}{'' if value is True else f'={value}'}: "
                    f"--moe-a2a-compress={method} does not cluster rows. Drop the option, or use "
                    "--moe-a2a-compress=lsh."
                )
