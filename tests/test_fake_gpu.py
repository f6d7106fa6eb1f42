"""The fake GPU sees what would be wrong on a real one."""

import sys

import pytest
import torch

from megatron_moe_comp import ops
from tests.fake_backward import backward
from tests.fake_gpu import DEVICE, fake_gpu, values

WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long().abs()),
    "a tensor of a list": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "an index on the CPU": lambda x: x[torch.tensor([0, 2])],
    "copy_ from the CPU": lambda x: x.copy_(torch.ones(3)),
}


@pytest.fixture
def real():
    return torch.tensor([1.0, -2.0, 3.0])


@pytest.mark.parametrize("wait", WAITS)
def test_the_host_waits(real, wait):
    with fake_gpu() as gpu:
        WAITS[wait](gpu.tensor(real))
    assert len(gpu.waits) == 1


def test_the_host_waits_in_a_reference(monkeypatch):
    rows, message = torch.ones(2, 16), torch.zeros(64, dtype=torch.uint8)
    table = [0, 2, 3, 0, 32]
    module = sys.modules[ops.gaussian_pack.__module__]
    pack = module.pack
    monkeypatch.setattr(module, "pack", lambda codes, bits: pack(codes.cpu(), bits).to("cuda"))
    with fake_gpu(frozenset()) as gpu:
        ops.gaussian_pack(gpu.tensor(rows), gpu.tensor(message), table)
    assert gpu.waits == [
        "gaussian._pack_reference: copy to the host",
        "gaussian._pack_reference: blocking copy to the device",
    ]


def test_the_host_does_not_wait(real):
    with fake_gpu() as gpu:
        x = gpu.tensor(real)
        (x > 0).nonzero_static(size=2)
        x.repeat_interleave(torch.ones_like(x).long(), output_size=3)
        torch.tensor([0.5, 2.0]).to(x.device, non_blocking=True)
    assert gpu.waits == []


@pytest.mark.parametrize("mistake", [lambda x: torch.empty(3), lambda x: torch.arange(3)])
def test_a_tensor_on_the_cpu(real, mistake):
    with fake_gpu() as gpu:
        x = gpu.tensor(real)
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            x + mistake(x)


def copied(gpu, x, *, waits=True, records=True):
    if waits:
        gpu.side.wait_stream(gpu.main)
    with gpu.on(gpu.side):
        copy = x.to("cpu", non_blocking=True)
        if records:
            x.record_stream(gpu.side)
    return copy


def test_a_copy_on_another_stream(real):
    with fake_gpu() as gpu:
        copy = copied(gpu, gpu.tensor(real))
        event = gpu.side.record_event()
        assert not torch.equal(copy, real)
        event.synchronize()
        assert torch.equal(copy, real)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"waits": False}, "without wait_stream"),
        ({"records": False}, "without record_stream"),
        ({}, "never waited for"),
    ],
)
def test_a_copy_on_another_stream_without_order(real, mistake, message):
    with pytest.raises(AssertionError, match=message), fake_gpu() as gpu:
        copied(gpu, gpu.tensor(real), **mistake)


def test_values_and_gradients_are_those_of_the_cpu():
    real = torch.randn(4, 6, requires_grad=True)

    def function(x):
        y = (x.view(6, 4) * x[0, :4]).sum(1)
        return (y.square() + y).half() / x[1, :, None].mean()

    expected = function(real)
    expected.backward(torch.ones_like(expected))
    with fake_gpu() as gpu:
        x = gpu.tensor(real)
        output = function(x)
        grad = backward(output, torch.ones_like(output))[x]
    assert output.device == grad.device == DEVICE
    assert torch.equal(values(output), expected)
    assert torch.equal(values(grad), real.grad)
