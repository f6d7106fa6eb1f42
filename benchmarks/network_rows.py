"""What benchmarks/network.py reports, from what its ranks measured: pure functions.

A visit is one method at one rate: {"repeat", "method", "rate", "steps", "ranks"}, the last being of
each rank the steps: {"seconds", "phases", "counts", "interface_bytes", "layers_interface_bytes",
"tokens_per_expert"}. The first step of a visit is no part of the times.
"""

from collections.abc import Callable, Iterable, Sequence
from statistics import mean, median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

Visit = dict[str, Any]
Row = dict[str, Any]

FLOAT32_BYTES = 4
NUM_WIRES = 4
MAX_OVERHEAD = 0.1


def make_row(visits: Sequence[Visit], rate: str, method: str, hidden_size: int) -> Row:
    """Returns the figures of one method at one rate, of a model and routing.

    Times are of the slowest rank. `speedup` and `share_of_gain` are medians over repeats, each of
    them compared with `none` in the same repeat. Bytes are per step and summed over ranks:
    `wire_bytes` as handed to the collectives, `float32_bytes` as stock would in float32; those of
    interfaces include headers, and are None where no interface is of the run alone.
    `most_loaded_bytes` are of one rank, layer and micro-batch; `phases` see there.

    Args:
        visits: all of a run but those that only warm up.
        rate: of the row.
        method: of the row.
        hidden_size: of the model, in float32.
    """
    ours, stock, free = (
        [v for v in visits if (v["rate"], v["method"]) == key]
        for key in ((rate, method), (rate, "none"), ("none", "none"))
    )
    repeats = [median(step_seconds(visit)) for visit in ours]
    stocks, frees = ([median(step_seconds(visit)) for visit in of] for of in (stock, free))
    speedups = [s / t for s, t in zip(stocks, repeats, strict=True)]
    all_ms = [1e3 * seconds for visit in ours for seconds in step_seconds(visit)]
    counts = _per_step(ours, lambda step: step["counts"])
    row: Row = {
        "rate": rate,
        "method": method,
        "step_ms": median(all_ms),
        "step_ms_min": min(all_ms),
        "step_ms_max": max(all_ms),
        "step_ms_repeats": [1e3 * seconds for seconds in repeats],
        "speedup": median(speedups),
        "speedup_min": min(speedups),
        "speedup_max": max(speedups),
        "share_of_gain": None if rate == "none" else shares_of_gain(repeats, stocks, frees),
        "wire_bytes": round(counts["WIRE"]),
        "float32_bytes": round(counts["RAW"]),
        "ratio": counts["RAW"] / counts["WIRE"],
        "most_loaded_bytes": _most_loaded_bytes(ours, hidden_size),
        "load_max_over_mean": loads(ours),
        "lsh_rate": counts["CENTROIDS"] / counts["CLUSTERED_ROWS"]
        if counts["CLUSTERED_ROWS"]
        else None,
        "phases": phases(ours),
    }
    return row | _interface(ours)


def step_seconds(visit: Visit) -> list[float]:
    """Returns the time of each timed step, of the slowest rank."""
    steps = list(zip(*visit["ranks"], strict=True))
    return [max(step["seconds"] for step in of_ranks) for of_ranks in steps[1:]]


def shares_of_gain(
    ours: Iterable[float], stocks: Iterable[float], frees: Iterable[float]
) -> float | None:
    """Returns the median over repeats of what ours gains over what free links would.

    None where they would gain nothing.
    """
    times = list(zip(ours, stocks, frees, strict=True))
    shares = [(stock - time) / (stock - free) for time, stock, free in times if stock > free]
    return median(shares) if shares else None


def phases(visits: Sequence[Visit]) -> dict[str, float]:
    """Returns milliseconds per step in each phase, mean over ranks and timed steps.

    With rest, which includes gradients' and counts' collectives, they sum to the mean step. The
    clock of a transfer runs while a rank waits for the slowest.
    """
    num_ranks = len(visits[0]["ranks"])
    seconds = _per_step(visits, lambda step: step["phases"])
    whole = _per_step(visits, lambda step: {"seconds": step["seconds"]})["seconds"]
    of_rank = {phase: 1e3 * total / num_ranks for phase, total in seconds.items()}
    return of_rank | {"rest": 1e3 * whole / num_ranks - sum(of_rank.values())}


def _per_step(
    visits: Sequence[Visit], figures: Callable[[dict[str, Any]], dict[str, float]]
) -> dict[str, float]:
    """Returns the mean over timed steps of figures summed over ranks."""
    num_steps = sum(len(step_seconds(visit)) for visit in visits)
    total: dict[str, float] = {}
    for step in _timed_steps(visits):
        for name, value in figures(step).items():
            total[name] = total.get(name, 0.0) + value / num_steps
    return total


def _timed_steps(visits: Sequence[Visit]) -> list[dict[str, Any]]:
    return [step for visit in visits for steps in visit["ranks"] for step in steps[1:]]


def _interface(visits: Sequence[Visit]) -> Row:
    """Returns what the interfaces counted, and of the all-to-alls beyond their own bytes.

    The all-to-alls' part is that of the first steps, up to the gradients' all-reduce; it includes
    the few bytes of the tokens' counts.
    """
    names = ("interface_bytes", "a2a_interface_bytes", "other_bytes", "protocol_overhead")
    if not any(step["interface_bytes"] for step in _timed_steps(visits)):
        return dict.fromkeys(names)
    whole = _per_step(visits, lambda step: {"bytes": step["interface_bytes"]})["bytes"]
    first = [steps[0] for visit in visits for steps in visit["ranks"]]
    layers = sum(step["layers_interface_bytes"] for step in first) / len(visits)
    others = sum(step["interface_bytes"] for step in first) / len(visits) - layers
    wire = sum(step["counts"]["WIRE"] for step in first) / len(visits)
    return dict(
        zip(names, (round(whole), round(layers), round(others), layers / wire - 1), strict=True)
    )


def _matrices(visits: Sequence[Visit]) -> list[list[list[int]]]:
    """Returns the pairs of each sender (rows) for each expert, of each layer and micro-batch."""
    passes = []
    for visit in visits:
        for of_ranks in list(zip(*visit["ranks"], strict=True))[1:]:
            passes += zip(*(step["tokens_per_expert"] for step in of_ranks), strict=True)
    return passes


def loads(visits: Sequence[Visit]) -> dict[str, float]:
    """Returns the most loaded expert's and rank's pairs over the mean, mean over all passes."""
    of_experts, of_ranks = [], []
    for senders in _matrices(visits):
        experts = [sum(counts) for counts in zip(*senders, strict=True)]
        per_rank = len(experts) // len(senders)
        ranks = [sum(experts[r * per_rank : (r + 1) * per_rank]) for r in range(len(senders))]
        of_experts.append(max(experts) / mean(experts))
        of_ranks.append(max(ranks) / mean(ranks))
    return {"experts": mean(of_experts), "ranks": mean(of_ranks)}


def _most_loaded_bytes(visits: Sequence[Visit], hidden_size: int) -> float:
    """Returns the bytes of the most loaded rank of a layer and micro-batch over the four wires.

    It sends or receives them, whichever is more. `none` has no codec to ask, and sends float32.
    """
    counts = _per_step(visits, lambda step: step["counts"])
    if counts["PASSES"]:
        return NUM_WIRES * counts["LOAD"] / counts["PASSES"]
    most = []
    for senders in _matrices(visits):
        per_rank = len(senders[0]) // len(senders)
        between = [
            [sum(row[r * per_rank : (r + 1) * per_rank]) for r in range(len(senders))]
            for row in senders
        ]
        sent = [sum(row) - row[rank] for rank, row in enumerate(between)]
        received = [sum(c) - c[rank] for rank, c in enumerate(zip(*between, strict=True))]
        most.append(max(*sent, *received))
    return mean(most) * NUM_WIRES * FLOAT32_BYTES * hidden_size


def warnings(rows: Sequence[Row]) -> list[str]:
    """Returns a sentence for each row whose bytes do not agree with what the interfaces counted."""
    return [
        f"{row['method']} at {row['rate']}: the interfaces counted {row['protocol_overhead']:+.1%} "
        "of the bytes that the all-to-alls were handed."
        for row in rows
        if row["protocol_overhead"] is not None
        and not 0 <= row["protocol_overhead"] <= MAX_OVERHEAD
    ]


def table(rows: Sequence[Row]) -> Table:
    """Returns the rows of one rate of a run, a line each; MB and milliseconds are per step."""
    first = rows[0]
    load = first["load_max_over_mean"]
    result = Table(
        title=f"{first['ranks']} ranks, links: {first['rate']}, {first['routing']} routing (most "
        f"loaded rank {load['ranks']:.2f}, expert {load['experts']:.2f} times the mean)",
        box=SIMPLE_HEAD,
    )
    result.add_column("method")
    columns = ("step (ms)", "speed-up", "of gain", "MB", "ratio", "overhead")
    for column in (*columns, *(phase for phase in first["phases"])):
        result.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        share, overhead = row["share_of_gain"], row["protocol_overhead"]
        result.add_row(
            row["method"],
            f"{row['step_ms']:.0f} ({row['step_ms_min']:.0f}..{row['step_ms_max']:.0f})",
            f"{row['speedup']:.2f}x ({row['speedup_min']:.2f}..{row['speedup_max']:.2f})",
            "" if share is None else f"{share:.0%}",
            f"{row['wire_bytes'] / 1e6:.2f}",
            f"{row['ratio']:.2f}x",
            "" if overhead is None else f"{overhead:.1%}",
            *(f"{ms:.0f}" for ms in row["phases"].values()),
        )
    return result
