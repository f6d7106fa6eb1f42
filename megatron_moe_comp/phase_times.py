"""PhaseTimes: how long one layer's all-to-alls take on one rank, phase by phase."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, get_args

import torch

Phase = Literal["encode", "transfer", "decode", "experts"]
"""encode: hashing, clustering and writing the message. transfer: the collective, with the wait for
the slowest rank. decode: reading the message and restoring rows from centroids. Of gradients, too.
"""

PHASES: tuple[Phase, ...] = get_args(Phase)

_UNTIMED = nullcontext()


class PhaseTimes:
    """Seconds by the host's clock in each phase, which do not nest; off until `start` is called.

    They are of tensors on the CPU: a device goes on with its work while the host's clock stops.
    """

    def __init__(self) -> None:
        self.seconds: dict[Phase, float] | None = None
        self._begun = 0.0

    def start(self) -> None:
        """Starts timing from zero."""
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def timed(self, phase: Phase) -> AbstractContextManager[None]:
        """Returns a context that counts as `phase`."""
        return _UNTIMED if self.seconds is None else self._timed(phase)

    @contextmanager
    def _timed(self, phase: Phase) -> Iterator[None]:
        self.begin()
        yield
        self.end(phase)

    def begin(self) -> None:
        """Starts the clock of the phase that `end` will name."""
        self._begun = time.perf_counter()

    def end(self, phase: Phase) -> None:
        """Counts the time since `begin` as `phase`."""
        if self.seconds is not None:
            self.seconds[phase] += time.perf_counter() - self._begun

    def time_gradient(self, result: torch.Tensor, phase: Phase) -> None:
        """Makes the backward of the operation that returned `result` count as `phase`."""
        if self.seconds is not None and result.grad_fn is not None:
            result.grad_fn.register_prehook(lambda _: self.begin())
            result.grad_fn.register_hook(lambda *_: self.end(phase))
