"""Compiles the CUDA sources of kernels/cuda, and the tests' own, for the CPU.

A library is kept in the temporary directory under the hash of everything that it is made of.
"""

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"
EMULATION = Path(__file__).parent / "emulation.h"
OPS = ("quantize_pack", "unpack_dequantize")
SOURCES = (*OPS, "unpack_dithered", "gaussian", "cluster_sum", "lsh_hash")

FLAGS = ["-std=c++17", "-g1", "-fPIC", "-shared", "-pthread", "-ffp-contract=off"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
SANITIZERS = {
    "plain": [],
    "address": ["-fsanitize=address"],
    "undefined": ["-fsanitize=undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread", "-DEMULATION_UCONTEXT"],
}
RUNTIMES = {"address": "libasan.so", "undefined": "libubsan.so", "thread": "libtsan.so"}


@functools.cache
def cuda_home() -> Path | None:
    """Returns the folder of the CUDA toolkit, or None without one."""
    if home := os.environ.get("CUDA_HOME"):
        return Path(home)
    if nvcc := shutil.which("nvcc"):
        # nvcc may be a script that starts the real one.
        run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True)
        for line in run.stderr.decode().splitlines():
            if line.startswith("#$ TOP="):
                return Path(line.removeprefix("#$ TOP=").strip()).resolve()
    return None


def missing_tool() -> str | None:
    """Returns why the CUDA sources cannot be compiled here, or None if they can."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    home = cuda_home()
    if home is None:
        return "no CUDA toolkit: nvcc is not on the path and CUDA_HOME is not set"
    if not (home / "include" / "cuda_fp16.h").exists():
        return f"the CUDA toolkit in {home} has no headers"
    return None


def compiled(command: Sequence[str], inputs: Sequence[Path], suffix: str) -> tuple[Path, str]:
    """Returns the file that `command` writes to "OUTPUT" in its arguments, and what it prints.

    Args:
        command: program and arguments.
        inputs: files of which the output depends.
        suffix: of the file.
    """
    key = hashlib.sha256(repr((list(command), _version(command[0]))).encode())
    for path in sorted(inputs):
        key.update(path.name.encode() + b"\0" + path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"megatron_moe_comp_cuda_tests_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / (key.hexdigest()[:32] + suffix)
    log = target.with_suffix(".log")
    if not (target.exists() and log.exists()):
        # Another process may be at it too: nobody sees a file that is not complete.
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            output = Path(temporary) / ("output" + suffix)
            arguments = [argument.replace("OUTPUT", str(output)) for argument in command]
            run = subprocess.run(arguments, capture_output=True, text=True, timeout=600)
            if run.returncode:
                raise RuntimeError(f"{' '.join(arguments)}\n{run.stdout}{run.stderr}")
            (Path(temporary) / "log").write_text(run.stdout + run.stderr)
            (Path(temporary) / "log").replace(log)
            output.replace(target)
    return target, log.read_text()


def emulated(op: str, sanitizer: str = "plain", kernels: Path = KERNELS) -> Path:
    """Returns the library that runs the kernels of an op on the CPU.

    Args:
        op: one of `SOURCES`.
        sanitizer: one of `SANITIZERS`.
        kernels: the folder of sources, or a changed copy of it.
    """
    source = kernels / "cuda" / f"{op}.cu"
    command = ["g++", *FLAGS, *SANITIZERS[sanitizer], "-isystem", f"{cuda_home()}/include"]
    command += ["-O1", "-Werror"] if kernels == KERNELS and sanitizer == "plain" else ["-O0"]
    command += ["-include", str(EMULATION), "-x", "c++", str(source), "-o", "OUTPUT"]
    headers = [*kernels.glob("*.cuh"), *kernels.glob("cuda/*.cuh"), *kernels.glob("cuda/*.h")]
    return compiled(command, [source, EMULATION, *headers], ".so")[0]


def device_code(op: str, architecture: int) -> tuple[str, str]:
    """Returns the PTX of an op's kernels, and what ptxas reports of their registers and spills.

    Args:
        op: one of `SOURCES`.
        architecture: 80, 90.
    """
    sources = [path for path in KERNELS.glob("**/*") if path.suffix in (".cu", ".cuh", ".h")]
    source = KERNELS / "cuda" / f"{op}.cu"
    command = ["nvcc", "-std=c++17", "-O3", f"-arch=compute_{architecture}", "-ptx"]
    ptx, _ = compiled([*command, str(source), "-o", "OUTPUT"], sources, ".ptx")
    command = ["nvcc", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin"]
    _, report = compiled([*command, str(ptx), "-o", "OUTPUT"], [ptx], ".cubin")
    return ptx.read_text(), report


def header_functions() -> Path:
    """Returns the library with functions of quantize_math.cuh."""
    source = Path(__file__).parent / "header_functions.cpp"
    command = ["g++", *FLAGS, "-O1", f"-I{KERNELS}", str(source), "-o", "OUTPUT"]
    return compiled(command, [source, KERNELS / "quantize_math.cuh"], ".so")[0]


def sanitizer_environment(sanitizer: str) -> dict[str, str]:
    """Returns the variables with which Python can load a library built for `sanitizer`."""
    environment = dict(os.environ)
    if sanitizer in RUNTIMES:
        command = ["g++", f"-print-file-name={RUNTIMES[sanitizer]}"]
        environment["LD_PRELOAD"] = subprocess.check_output(command, text=True).strip()
    # Python itself leaks and its allocator hides what is out of bounds.
    environment["ASAN_OPTIONS"] = "detect_leaks=0"
    environment["TSAN_OPTIONS"] = "halt_on_error=1"
    environment["PYTHONMALLOC"] = "malloc"
    return environment


@functools.cache
def _version(program: str) -> str:
    return subprocess.check_output([program, "--version"], text=True)
