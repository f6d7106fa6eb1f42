"""What several seeds say together: ratios to a baseline and their confidence intervals."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import mean, stdev

# Student's t, two-sided 95%, for 1 to 30 degrees of freedom.
T95 = [12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281]
T95 += [2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860]
T95 += [2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423]


@dataclass(frozen=True)
class PairedRatio:
    """Geometric mean of ratios of the same seed, and its 95% confidence interval."""

    mean: float
    low: float | None
    """None, as `high`, with a single seed."""
    high: float | None
    seeds: tuple[int, ...]


def paired_ratio(values: Mapping[int, float], baseline: Mapping[int, float]) -> PairedRatio | None:
    """Returns the ratio of values to a baseline, both by seed; None if they share no seed.

    The interval is Student's, of the mean of the logarithms: what all seeds of both have in common,
    such as the data's order, cancels in each ratio.
    """
    seeds = tuple(sorted(values.keys() & baseline.keys()))
    if not seeds:
        return None
    logs = [math.log(values[seed] / baseline[seed]) for seed in seeds]
    center = mean(logs)
    if len(seeds) == 1:
        return PairedRatio(math.exp(center), None, None, seeds)
    half = student_t95(len(seeds) - 1) * stdev(logs) / math.sqrt(len(seeds))
    return PairedRatio(math.exp(center), math.exp(center - half), math.exp(center + half), seeds)


def student_t95(degrees: int) -> float:
    """Returns the two-sided 95% quantile; beyond 30 degrees of freedom that of 30, too wide by 4%.

    Raises:
        ValueError: without a degree of freedom.
    """
    if degrees < 1:
        raise ValueError(f"{degrees} degrees of freedom: an interval needs at least two values.")
    return T95[min(degrees, len(T95)) - 1]


def running_mean(values: Iterable[float], window: int) -> list[float]:
    """Returns the mean of each value and the up to `window - 1` values before it."""
    values = list(values)
    starts = [max(0, end - window) for end in range(1, len(values) + 1)]
    return [mean(values[start : end + 1]) for end, start in enumerate(starts)]
