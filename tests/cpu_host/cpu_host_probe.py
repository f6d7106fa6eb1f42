"""Enables CPU host mode in a process of its own and prints what it then finds, as JSON.

The tests of cpu_host.patches run it once: the patches are for a whole process and are not undone.
"""

import json
import logging

import torch

from megatron_moe_comp.cpu_host import patches


def current(target):
    owner = patches.find_owner(target)
    return getattr(owner, target.rpartition(".")[2], None)


def rng_findings():
    states = []
    for seed in (1, 2, 1):
        torch.cuda.manual_seed(seed)
        states.append(torch.cuda.get_rng_state())
    torch.cuda.set_rng_state(states[1])
    drawn = torch.rand(4)
    torch.cuda.manual_seed(2)
    return {
        "the seed changes the state": not torch.equal(states[0], states[1]),
        "a seed gives one state": torch.equal(states[0], states[2]),
        "a state that is set gives the same draws": torch.equal(drawn, torch.rand(4)),
    }


def tracker_findings():
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("one", 11)
    tracker.add("two", 12)
    torch.manual_seed(5)
    outside = torch.get_rng_state()
    draws = {}
    for name in ("one", "two"):
        with tracker.fork(name):
            draws[name] = torch.rand(4)
    torch.manual_seed(11)
    after = torch.rand(4)
    torch.manual_seed(5)
    return {
        "forks draw from different streams": not torch.equal(draws["one"], draws["two"]),
        "a fork draws from its seed": torch.equal(draws["one"], after),
        "a fork leaves the state outside": torch.equal(outside, torch.get_rng_state()),
    }


def device_findings():
    made = {
        name: getattr(torch, name)(2, device="cuda")
        for name in ("tensor", "zeros", "ones", "empty", "rand")
    }
    made["empty_like"] = torch.empty_like(torch.zeros(2), device=torch.device("cuda", 1))
    made["Tensor.cuda"] = torch.zeros(2).cuda(non_blocking=True)
    findings = {f"{name} for cuda is on cpu": t.device.type == "cpu" for name, t in made.items()}
    findings["zeros for meta is on meta"] = torch.zeros(2, device="meta").device.type == "meta"
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.current_stream())
        stream.record_event().synchronize()
    findings["a new stream is not the current one"] = stream != torch.cuda.current_stream()
    return findings


def warnings_logged():
    seen = []
    logger = logging.getLogger(patches.RNG_LOGGER)
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logger.addHandler(handler)
    logger.warning("CPU RNG state changed within GPU RNG context")
    logger.warning("something else")
    return seen


def main():
    table = patches.CPU_PATCHES + patches.WHEEL_PATCHES
    targets = [patch.target for patch in table]
    untouched = torch.cuda.current_device
    originals = {target: current(target) for target in targets}
    report = {
        "patched on import": untouched.__module__ != "torch.cuda",
        "missing": [target for target in targets if originals[target] is None],
    }
    report["message"] = patches.enable()
    once = {target: current(target) for target in targets}
    report["same message again"] = patches.enable() == report["message"]
    report["unchanged"] = [t for t in targets if once[t] is originals[t]]
    report["changed twice"] = [t for t in targets if current(t) is not once[t]]
    report["findings"] = rng_findings() | tracker_findings() | device_findings()
    report["logged"] = warnings_logged()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
