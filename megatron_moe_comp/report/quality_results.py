"""What runs of benchmarks/quality.py say: by setting and seed, against `none` of the same seed."""

from collections.abc import Iterable, Mapping
from statistics import mean

from megatron_moe_comp.report.inputs import Entry
from megatron_moe_comp.report.statistics import PairedRatio, paired_ratio

BASELINE = "none"
Curve = dict[int, float]
"""Training loss by iteration."""
Runs = Mapping[str, Mapping[int, Entry]]
"""By setting, the baseline first, and by seed."""


def by_setting(runs: Iterable[Entry]) -> dict[str, dict[int, Entry]]:
    """Returns the runs by setting, the baseline first, then by compression, and by seed."""
    settings: dict[str, dict[int, Entry]] = {}
    for run in runs:
        settings.setdefault(run["setting"], {})[run["seed"]] = run
    ratios = {name: compression_ratio(seeds) or 0 for name, seeds in settings.items()}
    return dict(sorted(settings.items(), key=lambda item: (item[0] != BASELINE, ratios[item[0]])))


def perplexity_ratio(runs: Runs, setting: str) -> PairedRatio | None:
    """Returns validation perplexity over that of the baseline, paired by seed; None without it."""
    perplexities = {
        name: {seed: run["validation_perplexity"] for seed, run in runs.get(name, {}).items()}
        for name in (setting, BASELINE)
    }
    return paired_ratio(perplexities[setting], perplexities[BASELINE])


def compression_ratio(seeds: Mapping[int, Entry]) -> float | None:
    """Returns bytes as float32 over bytes sent, the mean over the seeds."""
    ratios = [run["stats"].get("ratio_fp32") for run in seeds.values()]
    return mean(ratio for ratio in ratios if ratio) if any(ratios) else None


def curves(seeds: Mapping[int, Entry]) -> dict[int, Curve]:
    """Returns the training loss of each seed whose run recorded it."""
    found = {seed: dict(map(tuple, run.get("curve") or [])) for seed, run in seeds.items()}
    return {seed: curve for seed, curve in found.items() if curve}


def common_iterations(found: Iterable[Curve]) -> list[int]:
    """Returns the iterations of which all curves tell the loss."""
    iterations = [set(curve) for curve in found]
    return sorted(set.intersection(*iterations)) if iterations else []
