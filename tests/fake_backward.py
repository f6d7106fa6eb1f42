"""The autograd engine's work for tensors of tests/fake_gpu.py: the engine wants to see the GPU."""

from collections.abc import Sequence
from typing import Any

import torch


def backward(output: torch.Tensor, grad: torch.Tensor) -> dict[torch.Tensor, torch.Tensor]:
    """The gradients of the leaves; hooks are not run."""
    waiting: dict[Any, int] = {}
    seen, todo = {output.grad_fn}, [output.grad_fn]
    while todo:
        for node, _ in todo.pop().next_functions:
            if node is not None:
                waiting[node] = waiting.get(node, 0) + 1
                if node not in seen:
                    seen.add(node)
                    todo.append(node)
    grads: dict[Any, dict[int, torch.Tensor]] = {output.grad_fn: {output.output_nr: grad}}
    leaves: dict[torch.Tensor, torch.Tensor] = {}
    ready = [output.grad_fn]
    while ready:
        node = ready.pop()
        arrived = grads.pop(node, {})
        if hasattr(node, "variable"):
            leaves[node.variable] = arrived[0]
            continue
        inputs = [
            _as_expected(arrived.get(i), expected)
            for i, expected in enumerate(node._input_metadata)
        ]
        targets = [edge for edge in node.next_functions if edge[0] is not None]
        results = _run(node, inputs) if arrived else [None] * len(targets)
        for (target, index), result in zip(targets, results, strict=True):
            if result is not None:
                sums = grads.setdefault(target, {})
                sums[index] = sums[index] + result if index in sums else result
            waiting[target] -= 1
            if not waiting[target]:
                ready.append(target)
    return leaves


def _as_expected(grad: torch.Tensor | None, expected: Any) -> torch.Tensor | None:
    """What the engine makes of a gradient: summed over what was broadcast, in the right dtype."""
    if grad is None:
        return None
    assert grad.device == expected.device
    if grad.shape != tuple(expected.shape):
        grad = grad.sum_to_size(tuple(expected.shape))
    return grad.to(expected.dtype)


def _run(node: Any, inputs: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The gradients of the inputs that need one."""
    with torch.no_grad():
        if hasattr(node, "apply"):  # of a Function in Python, with a place for every argument
            results = node.apply(*inputs)
            results = results if isinstance(results, tuple) else (results,)
            return [r for r, needed in zip(results, node.needs_input_grad, strict=True) if needed]
        results = node(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    edges = zip(results, node.next_functions, strict=True)
    return [result for result, (target, _) in edges if target is not None]
