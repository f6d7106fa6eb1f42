"""PhaseTimes: how long one layer's all-to-alls and experts take on one rank, phase by phase."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, get_args

import torch
from torch.autograd import profiler

Phase = Literal["encode", "transfer", "decode", "experts"]
"""encode: hashing, clustering and writing the message. transfer: the collective, with the wait for
the slowest rank. decode: reading the message and restoring rows from centroids. experts: putting
rows in their order and computing. Of gradients, too.
"""

PHASES: tuple[Phase, ...] = get_args(Phase)

Instant = float | torch.cuda.Event
"""A moment by the host's clock, or one that a device comes to."""


class PhaseTimes:
    """Seconds in each phase, which do not nest: of a device by its own clock, else by the host's.

    Each phase is a range `moe-a2a/PHASE` of a profile, whether times are taken or not: of
    torch.profiler, and of Nsight through `emit_nvtx`, as with Megatron's --profile.
    """

    def __init__(self) -> None:
        self.on = False
        """Whether times are taken; a gradient's if they were when its operation ran."""
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._on_device: list[tuple[Phase, torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        """Takes times from here on."""
        self.seconds()  # of events long ago, by now: few are kept, and the device is not waited for
        self.on = True

    def seconds(self) -> dict[Phase, float]:
        """Returns the seconds so far; waits for the device where times are its."""
        for phase, begun, ended in self._on_device:
            ended.synchronize()
            self._seconds[phase] += begun.elapsed_time(ended) / 1e3
        self._on_device.clear()
        return dict(self._seconds)

    def timed(self, phase: Phase, device: torch.device) -> AbstractContextManager[None]:
        """Returns a context in which what is done, on `device`, counts as `phase`."""
        # What torch keeps for such checks: a range takes some microseconds, in a profile or not.
        if self.on or profiler._is_profiler_enabled:
            return self._timed(phase, device)
        return nullcontext()

    @contextmanager
    def _timed(self, phase: Phase, device: torch.device) -> Iterator[None]:
        with profiler.record_function(f"moe-a2a/{phase}"):
            begun = _now(device) if self.on else None
            yield
            if begun is not None:
                self._count(phase, begun, device)

    def time_gradient(self, result: torch.Tensor, phase: Phase) -> None:
        """Makes the backward of the operation that returned `result` count as `phase`."""
        if not self.on or result.grad_fn is None:
            return
        # A hook that held `result`, which holds its node and so the hook, would never be freed.
        device, begun = result.device, []
        result.grad_fn.register_prehook(lambda _: begun.append(_now(device)))
        result.grad_fn.register_hook(lambda *_: self._count(phase, begun.pop(), device))

    def time_gradients(
        self, result: torch.Tensor, sources: Sequence[torch.Tensor], phase: Phase
    ) -> None:
        """Makes the backward of all that led from `sources` to `result` count as `phase`.

        It ends with the first of the sources whose gradient goes on: autograd comes to what was
        computed before them when it is through with what was computed after.
        """
        if not self.on or not result.requires_grad:
            return
        device, begun = result.device, []

        def end(_: torch.Tensor) -> None:
            if begun:
                self._count(phase, begun.pop(), device)

        result.register_hook(lambda _: begun.append(_now(device)))
        for source in sources:
            if source.requires_grad:
                source.register_hook(end)

    def _count(self, phase: Phase, begun: Instant, device: torch.device) -> None:
        ended = _now(device)
        if isinstance(ended, float):
            self._seconds[phase] += ended - begun
        else:
            self._on_device.append((phase, begun, ended))


def _now(device: torch.device) -> Instant:
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
