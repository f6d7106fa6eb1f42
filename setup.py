"""Builds the compiled kernels; everything declarative is in pyproject.toml.

The C++ kernels are always built, the CUDA kernels where torch is built for CUDA and its nvcc is
found (no GPU is needed). torch must be installed, so pip takes --no-build-isolation.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

try:
    import torch
except ImportError:
    sys.exit(
        "megatron_moe_comp is built against the torch that is installed, and there is none here: "
        "run `bash scripts/setup.sh`, or install torch, setuptools and ninja, and then this with "
        "`pip install --no-build-isolation`."
    )

KERNELS = Path("kernels")
HEADERS = sorted(str(path) for suffix in ("h", "cuh") for path in KERNELS.rglob(f"*.{suffix}"))
# Each float operation rounds once, so that the bytes are the same everywhere. OpenMP is not linked:
# its symbols must be those of torch's own runtime. GCC 12 warns about its AVX-512 header.
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fopenmp", "-fvisibility=hidden"]
CXX_FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
NVCC_FLAGS = ["-O3", "-fmad=false"]
CUDA_ARCHITECTURES = "8.0;9.0+PTX"


def sources(directory: str, *suffixes: str) -> list[str]:
    """Returns the source files of a directory of kernels/ that have one of the suffixes."""
    paths = (KERNELS / directory).glob("*")
    return sorted(str(path) for path in paths if path.suffix in suffixes)


def find_cuda_home() -> Path | None:
    """Returns where the CUDA toolkit is, or None; `nvcc` on the PATH may be a wrapper elsewhere."""
    nvcc = shutil.which("nvcc")
    candidates = [
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        nvcc and Path(nvcc).resolve().parent.parent,
        "/usr/local/cuda",
    ]
    for home in (Path(candidate) for candidate in candidates if candidate):
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return home
    return None


def why_not_cuda(cuda_home: Path | None) -> str | None:
    """Returns why the CUDA kernels cannot be built, or None."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if cuda_home is None:
        return f"no nvcc was found; install CUDA {torch.version.cuda} or set CUDA_HOME"
    major = torch.version.cuda.split(".")[0]
    version = subprocess.check_output([cuda_home / "bin/nvcc", "--version"], text=True)
    if f"release {major}." not in version:
        return f"torch needs the nvcc of CUDA {major}, which {cuda_home} is not; set CUDA_HOME"
    return None


def extensions() -> list[Extension]:
    """Returns the extension modules that can be built here."""
    cuda_home = find_cuda_home()
    reason = why_not_cuda(cuda_home)
    cuda_sources = sources("cuda", ".cu", ".cpp")
    if cuda_home is not None and reason is None:
        os.environ["CUDA_HOME"] = str(cuda_home)  # torch reads it when it is imported
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    found = [
        CppExtension(
            "megatron_moe_comp._kernels_cpu",
            sources("cpu", ".cpp"),
            depends=HEADERS,
            extra_compile_args=CXX_FLAGS,
        )
    ]
    if reason is not None:
        print(f"CUDA kernels are not built: {reason}.")
    elif cuda_sources:
        found.append(
            CUDAExtension(
                "megatron_moe_comp._kernels_cuda",
                cuda_sources,
                depends=HEADERS,
                extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
            )
        )
    return found


EXTENSIONS = extensions()

from torch.utils.cpp_extension import BuildExtension  # noqa: E402 (CUDA_HOME is set by now)

setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildExtension})
