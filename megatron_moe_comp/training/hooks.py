"""Hooks into Megatron's loop that keep what a user has put there."""

from collections.abc import Callable
from typing import Any

from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig


def after_gradients(config: TransformerConfig, then: Callable[[], None]) -> None:
    """Makes every iteration call `then` after its gradients are final.

    A function that is there already, a user's or one of ours, is called first. Every rank comes
    there once per iteration with no pipeline message pending, so `then` may be a collective.

    Args:
        config: changed in place.
        then: what to call.
    """
    finalize = config.finalize_model_grads_func or finalize_model_grads

    def finalize_and_then(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        result = finalize(*args, **kwargs)
        then()
        return result

    config.finalize_model_grads_func = finalize_and_then
