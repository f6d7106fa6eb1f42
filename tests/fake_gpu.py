"""A GPU that is not there: FakeTensors on "cuda" that carry their values in a tensor on the CPU.

    with fake_gpu() as gpu:
        message = encode(gpu.tensor(rows))
    assert gpu.waits == []
    assert torch.equal(values(message), encode(rows))

Every operation runs twice: as PyTorch's FakeTensorMode has it for CUDA, which refuses tensors of
two devices and operations whose result's size is data, and on the values. Both must agree on shape
and dtype. An op of ours without a CUDA kernel is traced through its reference. Beside the results
it keeps account of

- where the host waits for the device: reading a value, a size that is data, a blocking copy;
- streams: a tensor is used on another one after a `wait_stream` and with a `record_stream`, and a
  copy to the host is garbage until an event behind it was synchronized;
- bytes under way: nobody writes what is being sent or touches what is being received.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from megatron_moe_comp.comm import all_to_all
from megatron_moe_comp.cpu_host import patches
from megatron_moe_comp.cpu_host.replacements import with_cpu_device

DEVICE = torch.device("cuda", 0)
PACKAGE = "megatron_moe_comp"
_BINDING = Path(__file__).parents[1] / "kernels" / "cuda" / "binding.cpp"
CUDA_KERNELS = frozenset(re.findall(r'library\.impl\("(\w+)"', _BINDING.read_text()))
GARBAGE = -(1 << 40)
ATEN = torch.ops.aten


class Stream:
    """A queue of the device; knows up to when it waited for the others."""

    def __init__(self, gpu: "FakeGpu") -> None:
        self._gpu = gpu
        self.waited: dict[Stream, int] = {}

    def wait_stream(self, stream: "Stream") -> None:
        self.waited[stream] = self._gpu.clock

    def record_event(self) -> "Event":
        return Event(self._gpu, self, self._gpu.clock)


class Event:
    """A point in a stream; the copies to the host before it are there once it was waited for."""

    def __init__(self, gpu: "FakeGpu", stream: Stream, time: int) -> None:
        self._gpu, self._stream, self._time = gpu, stream, time

    def record(self) -> None:
        """Of an event that only times."""

    def synchronize(self) -> None:
        self._gpu.waits.append("the dispatcher's event")
        self._gpu.deliver(self._stream, self._time)


def values(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a tensor, which is not there, of the fake GPU."""
    return tensor.values_on_cpu


class FakeGpu(TorchDispatchMode):
    """What operations on the GPU do; see `fake_gpu`."""

    def __init__(self, fakes: FakeTensorMode, kernels: frozenset[str]) -> None:
        super().__init__()
        self._fakes = fakes
        self._kernels = kernels
        self.clock = 0
        self.main, self.side = Stream(self), Stream(self)
        self.stream = self.main
        self.waits: list[str] = []
        self._copies: list[tuple[Stream, int, torch.Tensor, torch.Tensor]] = []
        # By storage; they keep the tensors, so that no other gets its place.
        self._unrecorded: dict[tuple[int, Stream], torch.Tensor] = {}
        self._sending: dict[int, torch.Tensor] = {}
        self._receiving: dict[int, torch.Tensor] = {}

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        yield
        self.stream = before

    def tensor(self, real: torch.Tensor) -> torch.Tensor:
        """A tensor on the device that has, and shares, the values of one on the CPU."""
        fake = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device=DEVICE)
        fake.values_on_cpu = real.detach()
        return fake.requires_grad_(real.requires_grad)

    def record(self, tensor: torch.Tensor, stream: Stream) -> None:
        """What `Tensor.record_stream` does."""
        self._unrecorded.pop((_storage(tensor), stream), None)

    def deliver(self, stream: Stream, time: int) -> None:
        """What was copied to the host in a stream before this time is there."""
        for copy in [c for c in self._copies if c[0] is stream and c[1] <= time]:
            _, _, target, source = copy
            with unset_fake_temporarily():
                target.copy_(source)
            self._copies.remove(copy)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        used = [x for x in tensors if isinstance(x, FakeTensor)]
        if not used and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func.overloadpacket is ATEN.to:  # in a reference, where it has not become a copy yet
            with self:
                return func.decompose(*args, **kwargs)
        self.clock += 1
        for tensor in used:
            self._check_stream(tensor, func)
            self._check_transit(tensor, func)
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs)
        if func.namespace == PACKAGE and func._opname not in self._kernels:
            with self:  # what is registered for every device
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args)
        target = torch.device(kwargs.get("device") or DEVICE)
        if func is ATEN._to_copy.default and used and target.type == "cpu":
            return self._to_host(*args, **kwargs)
        return self._computed(func, args, kwargs)

    def _computed(self, func, args, kwargs):
        """The results of an operation on the device."""
        strangers = [x for x in tree_flatten(args)[0] if _is(x) and not isinstance(x, FakeTensor)]
        if func in (ATEN._to_copy.default, ATEN.copy_.default):
            blocking = not kwargs.get("non_blocking", len(args) > 2 and args[2])
            if blocking and strangers:
                self.waits.append(f"{_caller()}: blocking copy to the device")
        elif any(x.dim() for x in strangers):  # as an index, where it is allowed
            self.waits.append(f"{_caller()}: {func._opname} with a tensor on the CPU")
        with unset_fake_temporarily():
            reals = func(*tree_map(_on_cpu, args), **tree_map(_on_cpu, kwargs))
        try:
            fakes = func(*(tree_map(self._accepted, args)), **tree_map(self._accepted, kwargs))
        except (DataDependentOutputException, DynamicOutputShapeException):
            self.waits.append(f"{_caller()}: {func._opname}")
            with self:
                return tree_map(lambda x: self.tensor(x) if _is(x) else x, reals)
        for fake, real in zip(tree_flatten(fakes)[0], tree_flatten(reals)[0], strict=True):
            if isinstance(fake, FakeTensor):
                self._made(fake, real)
        return fakes

    def _made(self, fake: torch.Tensor, real: torch.Tensor) -> None:
        ours, theirs = ((x.shape, x.dtype) for x in (fake, real))
        assert ours == theirs, f"the fake says {ours}, the values are {theirs}"
        fake.values_on_cpu, fake.stream, fake.time = real, self.stream, self.clock

    def _accepted(self, value: Any) -> Any:
        """A number that PyTorch made a tensor of on the CPU may go with tensors on the device."""
        if not _is(value) or isinstance(value, FakeTensor):
            return value
        return self._fakes.from_tensor(value)

    def _to_host(self, source, *, non_blocking=False, **kwargs):
        with unset_fake_temporarily():
            real = ATEN._to_copy.default(values(source), **kwargs)
            if not non_blocking:
                self.waits.append(f"{_caller()}: copy to the host")
                return real
            target = torch.full_like(real, GARBAGE)
        self._copies.append((self.stream, self.clock, target, real))
        return target

    def _check_stream(self, tensor: torch.Tensor, func: Any) -> None:
        if tensor.stream is self.stream:
            return
        assert self.stream.waited.get(tensor.stream, -1) >= tensor.time, (
            f"{func} uses {tensor} of another stream without wait_stream"
        )
        self._unrecorded[_storage(tensor), self.stream] = tensor

    def _check_transit(self, tensor: torch.Tensor, func: Any) -> None:
        storage = _storage(tensor)
        assert storage not in self._receiving, f"{func} uses bytes that have not arrived"
        writes = func._schema.is_mutable and func.namespace != "c10d"
        assert not (writes and storage in self._sending), f"{func} while bytes are being sent"

    def _collective(self, func, args, kwargs):
        """What gloo gives for the values of tensors that NCCL takes."""
        for tensor in (x for x in tree_flatten(args)[0] if _is(x)):
            assert isinstance(tensor, FakeTensor), f"{func} of NCCL got {tensor} on the CPU"
            assert tensor.is_contiguous(), f"{func} of NCCL got a strided tensor"
        with unset_fake_temporarily():
            return func(*tree_map(_on_cpu, args), **kwargs)

    def exchange(self, buffer, input_splits, output_splits, group):
        """`exchange` as on NCCL, watched until it was waited for."""
        assert (buffer.device, buffer.dtype, buffer.dim()) == (DEVICE, torch.uint8, 1)
        assert all(type(n) is int for n in (*input_splits, *output_splits))
        assert (len(buffer), 0) == (sum(input_splits), input_splits[group.rank()])
        with patch.object(dist, "get_backend", lambda *_: "nccl"):
            received, arrival = _EXCHANGE(buffer, input_splits, output_splits, group)
        assert (received.device, received.dtype) == (DEVICE, torch.uint8)
        assert received.shape == (sum(output_splits),)
        self._sending[_storage(buffer)] = buffer
        self._receiving[_storage(received)] = received

        def wait() -> None:
            arrival.wait()
            del self._sending[_storage(buffer)], self._receiving[_storage(received)]

        return received, SimpleNamespace(wait=wait)

    def check_finished(self) -> None:
        assert not self._unrecorded, "used on another stream without record_stream"
        assert not self._copies, "a copy to the host was never waited for"
        assert not self._receiving, "bytes are still under way"


@contextmanager
def fake_gpu(kernels: frozenset[str] = CUDA_KERNELS) -> Iterator[FakeGpu]:
    """Yields the GPU, on which `kernels` are the ops that have a kernel of their own."""
    with FakeTensorMode() as fakes, ExitStack() as stack:
        gpu = FakeGpu(fakes, kernels)
        for patched in (
            patch("torch.cuda.current_stream", lambda *_: gpu.stream),
            patch("torch.cuda.stream", gpu.on),
            patch.object(FakeTensor, "tolist", lambda tensor: tensor.cpu().tolist()),
            patch("torch.Tensor.record_stream", lambda *args: gpu.record(*args)),
            patch("torch.cuda.Event", lambda **_: gpu.stream.record_event()),
            patch("torch.cuda.current_device", lambda: DEVICE),
            patch.object(all_to_all, "exchange", gpu.exchange),
            *(patch(name, _unwrapped(name)) for name in _FACTORIES),
            gpu,
        ):
            stack.enter_context(patched)
        yield gpu
        gpu.check_finished()


_EXCHANGE = all_to_all.exchange
_FACTORIES = [p.target for p in patches.CPU_PATCHES if p.replace is with_cpu_device]


def _unwrapped(target: str) -> Any:
    """A factory of torch, which Megatron's CPU host mode may have replaced."""
    factory = getattr(torch, target.removeprefix("torch."))
    return getattr(factory, "__wrapped__", factory)


def _is(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, FakeTensor):
        return values(value)
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _caller() -> str:
    """The function, of the package or else of Megatron, that the host is in."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith((PACKAGE, "megatron")):
            return f"{module.rpartition('.')[2]}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
