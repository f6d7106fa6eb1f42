"""What clustering adapts during training, per layer: its granularity.

The state follows from what each iteration measured, summed over all ranks, so it is the same on
every rank, and a checkpoint that holds it resumes exactly.
"""

from dataclasses import asdict, dataclass
from typing import NamedTuple

from megatron_moe_comp.options.lsh_options import LshOptions

GAIN = 0.2
"""Hash functions added for a rate of zero and a small target, or taken away for twice the target.
Stable where one multiplies the rate by 32, as it does for unrelated rows."""
MOST_HASHES = 16
"""Hash functions that adapting goes up to; their keys make nearly every row a cluster."""


class Measurement(NamedTuple):
    """What one iteration saw of one layer, over all ranks and micro-batches."""

    rows: float
    """Rows that could be clustered."""
    centroids: float
    """Clusters of them."""


@dataclass
class LshState:
    """The state of one layer; `options` are those of the run and not part of it."""

    coordinates: float
    """Rotated coordinates that are hashed, before rounding down."""

    @classmethod
    def initial(cls, options: LshOptions) -> "LshState":
        """Returns the state that training starts from: with warm-up, as fine as possible."""
        if options.moe_lsh_warmup_iters:
            return cls(float(max_coordinates(options)))
        return cls(float(options.moe_lsh_num_hashes * options.moe_lsh_hash_dim))

    @classmethod
    def resumed(cls, saved: dict[str, float], options: LshOptions) -> "LshState":
        """Returns the state of a checkpoint, within what the options of this run allow.

        Keys that this version does not know are ignored: earlier versions saved more.
        """
        state = cls(saved["coordinates"])
        most = float(max_coordinates(options))
        is_fixed = options.moe_lsh_target_rate is None
        state.coordinates = most if is_fixed else min(state.coordinates, most)
        return state

    @property
    def num_coordinates(self) -> int:
        """How many rotated coordinates are hashed."""
        return int(self.coordinates)

    def update(self, seen: Measurement, iteration: int, options: LshOptions) -> None:
        """Moves on to the next iteration.

        Args:
            seen: measured in the iteration that ends.
            iteration: its number, from 0.
            options: of the run.
        """
        if options.moe_lsh_target_rate is None or not seen.rows:
            return
        # The step is linear in the rate. If the rate oscillates around the target, the controller
        # holds its mean. The divisor is how fast rates between 0 and 1 change, least near both.
        target = target_rate(options, iteration + 1)
        excess = seen.centroids / seen.rows - target
        hashes = -GAIN * excess / max(target * (1.0 - target), 1e-9)
        step = options.moe_lsh_hash_dim * min(max(hashes, -1.0), 1.0)
        most = float(max_coordinates(options))
        self.coordinates = min(max(self.coordinates + step, 1.0), most)

    def state_dict(self) -> dict[str, float]:
        """Returns what a checkpoint holds, for `resumed`."""
        return asdict(self)


def target_rate(options: LshOptions, iteration: int) -> float:
    """Returns the rate aimed at in an iteration (from 0): from 1 down during warm-up."""
    done = min(iteration / options.moe_lsh_warmup_iters, 1.0) if options.moe_lsh_warmup_iters else 1
    return 1.0 + (options.moe_lsh_target_rate - 1.0) * done


def max_coordinates(options: LshOptions) -> int:
    """Returns the most coordinates that will be hashed."""
    adapted = 0 if options.moe_lsh_target_rate is None else MOST_HASHES
    return max(options.moe_lsh_num_hashes, adapted) * options.moe_lsh_hash_dim
