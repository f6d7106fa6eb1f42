"""What Megatron from PyPI lacks where neither Transformer Engine nor Apex is installed.

The wheel has no Makefile for its C++ helpers, and its distributed optimizer cannot load its own
state around torch's Adam: that one keeps a ``step`` tensor in the state of each parameter, which
the loading code does not expect. Every function here is a ``replace`` of a row of the table in
``patches``: called once with the original, it returns the replacement.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Replacement = Callable[..., Any]


def without_makefile(original: Replacement) -> Replacement:
    """Returns ``compile_helpers`` that has nothing to do where there is no Makefile."""

    def compile_helpers() -> None:
        if Path(original.__code__.co_filename).with_name("Makefile").exists():
            original()

    return compile_helpers


def with_state_before_loading(original: Replacement) -> Replacement:
    """Returns ``sharded_state_dict`` that first gives a fresh optimizer the state it will load."""

    @functools.wraps(original)
    def sharded_state_dict(
        self: Any,  # noqa: ANN401 (Megatron is not imported here)
        model_sharded_state_dict: Mapping[str, Any] | None = None,
        is_loading: bool = False,
        **kwargs: object,
    ) -> object:
        if is_loading and _is_torch_adam(self.optimizer):
            for group in self.optimizer.param_groups:
                for param in group["params"]:
                    _fill_adam_state(self.optimizer.state[param], param)
        return original(self, model_sharded_state_dict or {}, is_loading, **kwargs)

    return sharded_state_dict


def with_one_step_tensor_each(original: Replacement) -> Replacement:
    """Returns ``load_state_dict`` after which no two parameters share a ``step`` tensor."""

    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: Mapping[str, Any]) -> None:  # noqa: ANN401
        original(self, state_dict)
        if _is_torch_adam(self.optimizer):
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

    return load_state_dict


def with_step_left_alone(original: Replacement) -> Replacement:
    """Returns the setter of one parameter's state that does not touch its ``step``.

    ``load_state_dict`` has set the step already, and ``tensors`` holds none, or a stale one.
    """

    @functools.wraps(original)
    def set_main_param_and_optimizer_states(
        self: Any,  # noqa: ANN401
        model_param: torch.nn.Parameter,
        tensors: Mapping[str, Any],
    ) -> None:
        if _is_torch_adam(self.optimizer):
            tensors = {**tensors, "step": None}
        with torch.no_grad():
            original(self, model_param, tensors)

    return set_main_param_and_optimizer_states


def _is_torch_adam(optimizer: object) -> bool:
    return isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))


def _fill_adam_state(state: dict[str, torch.Tensor], param: torch.Tensor) -> None:
    """Gives an empty ``state`` the tensors that torch's Adam makes at its first step."""
    if not state:
        state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
        state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
