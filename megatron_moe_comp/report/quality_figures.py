"""Sections from quality runs: loss curves, and compression against perplexity."""

from collections.abc import Mapping, Sequence
from itertools import batched
from statistics import mean

from matplotlib.ticker import NullFormatter, ScalarFormatter

from megatron_moe_comp.report.drawing import BLACK, Style, legend_below, panel, to_svg
from megatron_moe_comp.report.network_results import Case, bits_label, rate_bits
from megatron_moe_comp.report.quality_results import (
    BASELINE,
    Runs,
    common_iterations,
    compression_ratio,
    curves,
    perplexity_ratio,
)
from megatron_moe_comp.report.section import Missing, Picture, Section, Table, number, spread
from megatron_moe_comp.report.statistics import running_mean

NETWORK = "rows of `python benchmarks/network.py --json PATH`"
REMEDY = "runs of `python benchmarks/quality.py --results DIR`"
SMOOTHED_SHARE, TABLE_ROWS, TABLE_SETTINGS = 0.05, 10, 5
Band = tuple[list[int], list[float], list[float], list[float]]
"""Iterations; mean, smallest and largest over seeds."""


def loss_bands(runs: Runs) -> dict[str, Band]:
    """Returns the training loss of each setting that recorded it."""
    bands = {}
    for setting, seeds in runs.items():
        found = curves(seeds).values()
        if steps := common_iterations(found):
            losses = [[curve[step] for curve in found] for step in steps]
            bands[setting] = band(steps, losses)
    return bands


def difference_bands(runs: Runs) -> dict[str, Band]:
    """Returns how much higher the loss is than the baseline's of the same seed, smoothed."""
    baseline, bands = curves(runs.get(BASELINE, {})), {}
    for setting, seeds in runs.items():
        pairs = [(curve, baseline[s]) for s, curve in curves(seeds).items() if s in baseline]
        steps = common_iterations(curve for pair in pairs for curve in pair)
        if setting == BASELINE or not steps:
            continue
        window = smoothing_window(steps)
        differences = [
            running_mean([curve[step] - other[step] for step in steps], window)
            for curve, other in pairs
        ]
        bands[setting] = band(steps, list(zip(*differences, strict=True)))
    return bands


def smoothing_window(steps: Sequence[int]) -> int:
    """Returns how many points of a curve a smoothed one averages."""
    return max(1, round(SMOOTHED_SHARE * len(steps)))


def band(steps: list[int], losses: Sequence[Sequence[float]]) -> Band:
    """Returns mean and range over the seeds of values [steps, seeds]."""
    return steps, list(map(mean, losses)), list(map(min, losses)), list(map(max, losses))


def loss_section(runs: Runs, styles: Mapping[str, Style]) -> Section | Missing:
    """Returns the training loss of every setting against steps."""
    title = "Training loss"
    bands = loss_bands(runs)
    if not bands:
        return Missing(title, REMEDY)
    text = (
        "Mean over seeds; shaded, or in brackets, from the smallest to the largest. The difference "
        f"to none is of the same seed, and the mean of {SMOOTHED_SHARE:.0%} of the curve's points. "
        "The first tenth of the curves is above the picture."
    )
    section = Section(title, text)
    picture = Picture("Loss against steps", draw_bands(bands, styles, "training loss"))
    section.pictures.append(picture)
    section.tables.extend(band_tables("Training loss", bands))
    if differences := difference_bands(runs):
        svg = draw_bands(differences, styles, "loss above none, smoothed", baseline=0)
        section.pictures.append(Picture("Difference to none", svg))
        section.tables.extend(band_tables("Training loss above none, smoothed", differences))
    return section


def draw_bands(
    bands: Mapping[str, Band],
    styles: Mapping[str, Style],
    label: str,
    baseline: float | None = None,
    minutes_per_step: Mapping[str, float] | None = None,
) -> str:
    """Returns the curves as SVG, against steps or, with the time of a step, against minutes."""
    figure, axes = panel()
    for index, (setting, (steps, middle, low, high)) in enumerate(bands.items()):
        scale = minutes_per_step[setting] if minutes_per_step else 1
        places = [step * scale for step in steps]
        axes.fill_between(places, low, high, color=styles[setting].color, alpha=0.12, linewidth=0)
        # Each curve has its markers at other places, so that no two lie upon each other.
        every = max(1, len(steps) // 8)
        start = index * every // max(1, len(bands))
        axes.plot(places, middle, markevery=(start, every), label=setting, **vars(styles[setting]))
    if baseline is not None:
        axes.axhline(baseline, color=BLACK, linewidth=1.2, label=BASELINE)
    else:
        # The steep start would flatten everything that comes after it.
        axes.set_ylim(top=max(high[len(high) // 10] for *_, high in bands.values()))
    axes.set_xlabel("minutes" if minutes_per_step else "iteration")
    axes.set_ylabel(label)
    legend_below(figure, axes)
    return to_svg(figure)


def band_tables(caption: str, bands: Mapping[str, Band]) -> list[Table]:
    """Returns about ten rows of the curves, the last one included, some settings to a table."""
    longest = max((steps for steps, *_ in bands.values()), key=len)
    stride = -(-len(longest) // TABLE_ROWS)
    iterations = longest[::-1][::stride][::-1]
    cells = {name: band_cells(band, iterations) for name, band in bands.items()}
    return [
        Table(
            caption,
            ("iteration", *group),
            list(zip(map(str, iterations), *(cells[name] for name in group), strict=True)),
        )
        for group in batched(cells, TABLE_SETTINGS)
    ]


def band_cells(band: Band, iterations: Sequence[int]) -> list[str]:
    """Returns mean and range at these iterations."""
    steps, *values = band
    at = {step: [value[index] for value in values] for index, step in enumerate(steps)}
    return [spread(*at[step], 3) if step in at else "-" for step in iterations]


def time_section(
    runs: Runs, found: Sequence[Case], styles: Mapping[str, Style]
) -> Section | Missing:
    """Returns the training loss against the time that the steps take on a link."""
    title = "Training loss against time on a link"
    bands = loss_bands(runs)
    # A model's own routing is what it trains with.
    ordered = sorted(found, key=lambda case: (case.routing != "real", case.ranks))
    cases = [case for case in ordered if sum(name in bands for name in case.methods) > 0][:1]
    if not cases:
        return Missing(title, f"{REMEDY}, together with {NETWORK} of the same methods")
    case = cases[0]
    text = (
        "No run was timed on a link: the time is iterations x the median step that was measured "
        f"for the method on this link ({case.name}). The model measured there and the one that was "
        "trained need not be the same; what is compared is the methods."
    )
    section, rows = Section(title, text), []
    for rate in case.rates:
        measured = {m: row for (r, m), row in case.by_rate_and_method.items() if r == rate}
        shown = {name: values for name, values in bands.items() if name in measured}
        if not shown:
            continue
        minutes = {name: measured[name]["step_ms"] / 60e3 for name in shown}
        label = bits_label(rate_bits(rate))
        svg = draw_bands(shown, styles, "training loss", minutes_per_step=minutes)
        section.pictures.append(Picture(label, svg))
        for name, (steps, middle, *_) in shown.items():
            step_ms, last = measured[name]["step_ms"], steps[-1]
            cells = (f"{step_ms:.0f}", str(last), f"{minutes[name] * last:.1f}")
            rows.append((label, name, *cells, f"{middle[-1]:.3f}"))
    header = ("link", "setting", "ms per step", "iterations", "minutes", "training loss")
    section.tables.append(Table("Time of all iterations", header, rows, text_columns=2))
    return section


def ratio_section(runs: Runs, styles: Mapping[str, Style]) -> Section | Missing:
    """Returns validation perplexity over the baseline's against compression."""
    title = "Compression against quality"
    ratios = {name: r for name in runs if (r := perplexity_ratio(runs, name))}
    if not ratios.keys() - {BASELINE}:
        return Missing(title, f"{REMEDY}, with setting none and another one on the same seeds")
    figure, axes = panel()
    axes.axhline(1, color=BLACK, linewidth=1.2)
    rows = []
    for name, seeds in runs.items():
        ratio, bytes_ratio = ratios.get(name), compression_ratio(seeds)
        perplexity = mean(run["validation_perplexity"] for run in seeds.values())
        cells = [number(bytes_ratio, 2, "x"), f"{perplexity:.2f}"]
        compared = spread(ratio.mean, ratio.low, ratio.high, 4) if ratio else "-"
        cells.append("1" if name == BASELINE else compared)
        rows.append((name, *cells, ", ".join(map(str, sorted(seeds)))))
        if ratio is None or bytes_ratio is None:
            continue
        error = None
        if name != BASELINE and ratio.low is not None and ratio.high is not None:
            error = [[ratio.mean - ratio.low], [ratio.high - ratio.mean]]
        style = styles[name]
        look = {"color": style.color, "marker": style.marker, "linestyle": "none"}
        axes.errorbar([bytes_ratio], [ratio.mean], error, capsize=3, label=name, **look)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("float32 bytes / bytes sent")
    axes.set_ylabel("perplexity / that of none")
    legend_below(figure, axes)
    header = ("setting", "ratio of bytes", "perplexity, mean", "ratio to none (95%)", "seeds")
    text = (
        "Validation perplexity over that of none with the same seed: geometric mean, with the 95% "
        "confidence interval of paired logarithms (Student's t). Bytes are counted at the "
        "collective, over all four wires, scales and probabilities included. Down and right is "
        "better."
    )
    picture = Picture("Perplexity against compression", to_svg(figure))
    return Section(title, text, [picture], [Table("All settings", header, rows)])
