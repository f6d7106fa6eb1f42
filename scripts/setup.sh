#!/usr/bin/env bash
# Creates .venv with everything installed and the kernels compiled. Done again only when what is to
# be installed changed; changed kernels are only compiled again.
#   bash scripts/setup.sh
# Python 3.12 is taken from $PYTHON, the PATH, pyenv or uv, whichever has it first. SYSTEM_PACKAGES=1
# uses the torch that it has; see docs/containers.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

is_python312() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null
}

find_python() {
    if [[ -n ${PYTHON:-} ]]; then
        is_python312 "$PYTHON" && command -v "$PYTHON" && return
        echo "PYTHON=$PYTHON is not a Python 3.12 with the venv module." >&2
        return 1
    fi
    local candidate
    for candidate in python3.12 python3 python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12 \
        "$(uv python find 3.12 2>/dev/null || true)"; do
        [[ -n $candidate ]] && is_python312 "$candidate" && command -v "$candidate" && return
    done
    cat >&2 <<'MESSAGE'
Python 3.12 (with venv) was not found on the PATH, in pyenv or in uv. Install it with one of
    apt-get install python3.12 python3.12-venv
    pyenv install 3.12
    uv python install 3.12
or name one: PYTHON=/path/to/python3.12 bash scripts/run_local.sh
MESSAGE
    return 1
}

require_compiler() {
    command -v "${CXX:-c++}" > /dev/null && return
    cat >&2 <<MESSAGE
The kernels need a C++ compiler, and ${CXX:-c++} was not found. Install g++ 10 or newer:
    apt-get install g++
or name one: CXX=/path/to/g++ bash scripts/setup.sh
MESSAGE
    return 1
}

is_current() {
    [[ -f $1 && $(< "$1") == "$2" ]]
}

shopt -s globstar nullglob
system_packages=
[[ ${SYSTEM_PACKAGES:-} != 1 ]] || system_packages=--system-site-packages
wanted="$(cat pyproject.toml constraints.txt | sha256sum) $PWD$system_packages"
toolkit="$(command -v nvcc || true) ${CUDA_HOME:-} ${TORCH_CUDA_ARCH_LIST:-} ${CXX:-}"
sources="$(cat setup.py kernels/**/*.{cpp,h,cu,cuh} | sha256sum) $toolkit $wanted"
installed=.venv/.installed
built=.venv/.built
if is_current $installed "$wanted" && is_current $built "$sources"; then
    exit 0
fi

exec 9> .venv.lock
flock 9
if is_current $installed "$wanted" && is_current $built "$sources"; then
    exit 0 # another run did it while this one waited
fi
# First: a kernel that is not built any more must not stay behind, a failed build must be repeated.
rm -f $built megatron_moe_comp/_kernels_*.so
if ! is_current $installed "$wanted"; then
    python=$(find_python)
    require_compiler
    echo "Installing into .venv with $python: PyTorch and Megatron, about 5 GB, a few minutes ..."
    "$python" -m venv --clear ${system_packages:+"$system_packages"} .venv
    .venv/bin/python scripts/base_packages.py constraints.txt > .venv/constraints.txt
    # Set, not added to: images have constraints of their own, which need not agree with these.
    export PIP_CONSTRAINT=.venv/constraints.txt # pip divides it at spaces
    .venv/bin/python -m pip install --quiet --upgrade "pip>=24"
    # The kernels are compiled against this torch; an isolated build would download another.
    .venv/bin/python -m pip install "setuptools>=77" "packaging>=24.2" ninja torch
    .venv/bin/python -m pip install --no-build-isolation -e '.[test]'
    echo "$wanted" > $installed
else
    require_compiler
    echo "Compiling the changed kernels ..."
    if ! output=$(.venv/bin/python setup.py build_ext --inplace 2>&1); then
        echo "$output" >&2
        exit 1
    fi
fi
.venv/bin/python setup.py --name 2> /dev/null | grep "^CUDA kernels" || true
echo "$sources" > $built
