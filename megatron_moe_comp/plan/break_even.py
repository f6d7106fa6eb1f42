"""From which message and up to which bandwidth a method is faster than sending rows as they are."""

from collections.abc import Callable
from dataclasses import replace

from megatron_moe_comp.plan.cost_model import Link, Machine, Method, predict
from megatron_moe_comp.plan.shape import Layout, Model

SEARCH_RANGE, SEARCH_STEPS = 1e6, 60


def break_even_bandwidth(
    model: Model,
    layout: Layout,
    machine: Machine,
    stock: Method,
    method: Method,
    speedup: float = 1.0,
) -> float:
    """Returns the bandwidth, in bytes per second, above which `method` is slower than `stock`.

    With another `speedup`: above which it is not so many times as fast. Of the links between nodes,
    or of the node's own where there are no others. 0: it never pays; infinity: it always does.
    """
    name = "far" if layout.far_peers else "near"
    link: Link = getattr(machine, name)

    def pays(factor: float) -> bool:
        other = replace(machine, **{name: replace(link, bandwidth=factor * link.bandwidth)})
        steps = [predict(model, layout, other, m).step for m in (method, stock)]
        return speedup * steps[0] < steps[1]

    return link.bandwidth * _boundary(pays)


def break_even_message(
    model: Model, layout: Layout, machine: Machine, stock: Method, method: Method
) -> float:
    """Returns the bytes of stock's message of a rank below which `method` is slower than `stock`.

    The message of the first wire of the first stack; other rows and their computing scale with it.
    0: it always pays; infinity: it never does.
    """

    def costs(factor: float) -> bool:
        smaller = replace(model, micro_batch_size=factor * model.micro_batch_size)
        steps = [predict(smaller, layout, machine, m.scaled(factor)).step for m in (method, stock)]
        return steps[0] >= steps[1]

    return stock.traffic[0].wires[0].mean_bytes * _boundary(costs)


def _boundary(holds: Callable[[float], bool]) -> float:
    """Returns the factor beyond which `holds` is false: 0 if anywhere, infinity if nowhere."""
    low, high = 1 / SEARCH_RANGE, SEARCH_RANGE
    if holds(high):
        return float("inf")
    if not holds(low):
        return 0.0
    for _ in range(SEARCH_STEPS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
