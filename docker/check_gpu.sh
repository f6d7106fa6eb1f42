#!/usr/bin/env bash
# Fails unless the packages of the base image are still the ones in use and CUDA kernels are compiled.
#   check_gpu.sh PYTHON KEPT      KEPT: what scripts/base_packages.py printed before the install
set -euo pipefail
python=$1 kept=$2

replaced=$(comm -23 <(sort "$kept") \
    <("$python" "$(dirname "${BASH_SOURCE[0]}")/../scripts/base_packages.py" | sort))
if [[ -n $replaced ]]; then
    echo "Packages of the base image were replaced: $replaced" >&2
    exit 1
fi
if ! grep -q '^torch==' "$kept"; then
    echo "The base image has no torch." >&2
    exit 1
fi
"$python" -m megatron_moe_comp.ops --require cpu cuda
