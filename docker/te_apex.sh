#!/usr/bin/env bash
# Installs Transformer Engine and Apex where the base image has none, which takes long to compile.
#   te_apex.sh PYTHON
set -euo pipefail
python=$1

lacks() {
    "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is not None)"
}

if lacks transformer_engine; then
    "$python" -m pip install --no-build-isolation 'transformer-engine[pytorch]'
fi
if lacks apex; then
    APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "$python" -m pip install --no-build-isolation \
        'apex @ git+https://github.com/NVIDIA/apex@26.09'
fi
