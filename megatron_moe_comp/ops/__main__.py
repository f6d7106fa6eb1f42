"""Prints for each op and device whether a compiled kernel or the reference serves it.

    python -m megatron_moe_comp.ops
    python -m megatron_moe_comp.ops --require cpu cuda

Ends with status 1 where the package or a compiled kernel does not load, or nothing is compiled for
a required device. No GPU is needed.
"""

import argparse
import importlib
import importlib.util

import torch

from megatron_moe_comp.ops import is_compiled

NAMESPACE = "megatron_moe_comp::"
CUDA_KERNELS = "megatron_moe_comp._kernels_cuda"
DEVICES = ("cpu", "cuda")


def op_names() -> list[str]:
    """Returns the names of the package's ops."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix(NAMESPACE) for name in names if name.startswith(NAMESPACE))


def main() -> None:
    """Prints the table; raises SystemExit where a required device has no compiled kernel."""
    parser = argparse.ArgumentParser("python -m megatron_moe_comp.ops")
    parser.add_argument("--require", nargs="+", choices=DEVICES, default=[])
    required = parser.parse_args().require
    if importlib.util.find_spec(CUDA_KERNELS) is not None:
        importlib.import_module(CUDA_KERNELS)  # the package itself does so with a GPU alone

    rows = [(op, [is_compiled(device, op) for device in DEVICES]) for op in op_names()]
    print(f"{'op':<20}" + "".join(f"{device:<10}" for device in DEVICES).rstrip())
    for op, compiled in rows:
        cells = ("compiled" if found else "reference" for found in compiled)
        print(f"{op:<20}" + "".join(f"{cell:<10}" for cell in cells).rstrip())
    for device in required:
        if not any(compiled[DEVICES.index(device)] for _, compiled in rows):
            raise SystemExit(
                f"No kernel is compiled for {device}; `python setup.py --name` says why."
            )


if __name__ == "__main__":
    main()
