"""What takes the place of CUDA in Megatron on a machine without one.

Every function here is a ``replace`` of a row of the table in ``patches``: it is called once
with the original and returns its replacement. On CPU the default generator plays the part of the
CUDA generator, the one device is ``cpu``, and a stream is an object that has nothing to wait for.
"""

import functools
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

Replacement = Callable[..., Any]

# Compute capability that Megatron is told. From 10 on it does not ask for
# CUDA_DEVICE_MAX_CONNECTIONS=1, which orders kernels on a stream that does not exist here.
REPORTED_ARCH_VERSION = 10

RNG_WARNING = "CPU RNG state changed within GPU RNG context"


class CpuStream:
    """Takes the place of ``torch.cuda.Stream``: what was started on CPU has finished."""

    def wait_stream(self, stream: object) -> None:
        """Returns at once."""

    def synchronize(self) -> None:
        """Returns at once."""

    def record_event(self) -> "CpuStream":
        """Returns an object that can be synchronized like an event."""
        return self


def returns(value: object) -> Callable[[Any], Replacement]:
    """Returns a ``replace`` whose function ignores its arguments and returns ``value``."""

    def replace(original: Any) -> Replacement:  # noqa: ANN401 (any callable of torch's)
        def constant(*args: object, **kwargs: object) -> object:
            return value

        return constant

    return replace


def with_cpu_stream(original: type) -> type[CpuStream]:
    """Returns the class of streams that have nothing to wait for."""
    return CpuStream


def with_cpu_device(original: Replacement) -> Replacement:
    """Returns a tensor factory that creates on CPU what it is asked to create on CUDA."""

    @functools.wraps(original)
    def factory(*args: object, **kwargs: object) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = "cpu"
        return original(*args, **kwargs)

    return factory


def with_local_world_size(original: Replacement) -> Replacement:
    """Returns ``device_count`` counting one device for each process on this machine."""

    def device_count() -> int:
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    return device_count


def with_same_tensor(original: Replacement) -> Replacement:
    """Returns ``Tensor.cuda`` that leaves a tensor where it is."""

    def cuda(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return self

    return cuda


def with_cuda_type_names(original: Replacement) -> Replacement:
    """Returns ``Tensor.type`` that tells Megatron's optimizers the CUDA name of a CPU tensor.

    They compare it with "torch.cuda.HalfTensor" and so on; every other caller is told the truth.
    """

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        name = original(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(name, str) and caller.startswith("megatron.core.optimizer"):
            return name.replace("torch.", "torch.cuda.", 1)
        return name

    return tensor_type


def with_cpu_generator_state(original: Replacement) -> Replacement:
    """Returns ``get_rng_state`` for the CPU's generator, whatever device is asked for."""

    def get_rng_state(*args: object, **kwargs: object) -> torch.Tensor:
        return torch.get_rng_state()

    return get_rng_state


def with_cpu_generator_set(original: Replacement) -> Replacement:
    """Returns ``set_rng_state`` for the CPU's generator, whatever device is asked for."""

    def set_rng_state(new_state: torch.Tensor, *args: object, **kwargs: object) -> None:
        torch.set_rng_state(new_state)

    return set_rng_state


def with_cpu_seed(original: Replacement) -> Replacement:
    """Returns ``torch.cuda.manual_seed`` that seeds the CPU's generator at once."""

    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    return manual_seed


def with_zero_statistics(original: Replacement) -> Replacement:
    """Returns ``torch.cuda.memory_stats`` in which every counter exists and is 0."""

    def memory_stats(*args: object, **kwargs: object) -> dict[str, int]:
        return defaultdict(int)

    return memory_stats


def with_cuda_allowed_missing(original: Replacement) -> Replacement:
    """Returns ``initialize_megatron`` with its own switch for a machine without CUDA set."""
    return functools.partial(original, allow_no_cuda=True)


def with_splits_as_numpy(original: Replacement) -> Replacement:
    """Returns ``maybe_move_tensor_to_cpu`` that converts CPU tensors to numpy where asked to."""

    def maybe_move_tensor_to_cpu(
        tensor: torch.Tensor, as_numpy: bool = False, record_stream: bool = False
    ) -> Any:  # noqa: ANN401 (a tensor, an array, or what was passed)
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return maybe_move_tensor_to_cpu


def with_equal_gather_parts(original: Replacement) -> Replacement:
    """Returns the gather of rows that pads unequal parts, which gloo refuses, to the longest."""

    def gather_along_first_dim(
        input_: torch.Tensor,
        group: torch.distributed.ProcessGroup,
        output_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return original(input_, group, output_split_sizes, use_global_buffer)
        longest = max(output_split_sizes)
        padded = original(_pad_rows(input_, longest), group)
        parts = padded.unflatten(0, (group.size(), longest))
        return torch.cat([part[:n] for part, n in zip(parts, output_split_sizes, strict=True)])

    return gather_along_first_dim


def _pad_rows(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Returns ``rows`` followed by rows of zeros, ``num_rows`` in all."""
    missing = rows.new_zeros((num_rows - rows.size(0), *rows.shape[1:]))
    return torch.cat([rows, missing])


def with_own_generator(original: Replacement) -> Replacement:
    """Returns the builder of data loaders whose seeds do not come from dropout's generator."""

    @functools.wraps(original)
    def build_pretraining_data_loader(
        dataset: object, consumed_samples: int
    ) -> torch.utils.data.DataLoader | None:
        loader = original(dataset, consumed_samples)
        if isinstance(loader, torch.utils.data.DataLoader):
            loader.generator = torch.Generator().manual_seed(torch.initial_seed())
        return loader

    return build_pretraining_data_loader


def is_not_rng_warning(record: logging.LogRecord) -> bool:
    """Returns False for the tracker's warning, which on CPU every fork of the RNG would log."""
    return record.getMessage() != RNG_WARNING
