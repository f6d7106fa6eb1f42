#!/usr/bin/env bash
# Runs on this machine's GPUs what docs/gpu-status.md lists, except what needs more than one node.
#   bash scripts/test_gpu.sh
# Stops at the first thing that fails. Some 20 minutes; results go to runs/gpu.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

gpus=$(nvidia-smi --list-gpus 2> /dev/null | grep -c GPU || true)
if ! ((gpus)); then
    echo "No GPU: nvidia-smi is not there or lists none. Nothing was tested." >&2
    exit 1
fi
bash scripts/setup.sh
python=.venv/bin/python
$python - << 'CHECK'
import torch

from megatron_moe_comp import ops

if not torch.cuda.is_available():
    raise SystemExit(f"torch {torch.__version__} sees no GPU. Nothing was tested.")
if not ops.is_compiled("cuda"):
    raise SystemExit("The CUDA kernels are not built: `python setup.py --name` says why.")
CHECK
mkdir -p runs/gpu
export OMP_NUM_THREADS=1

heading() { printf '\n== %s ==\n' "$*"; }

heading "Kernels, byte for byte"
kernels=(tests/ops/test_cuda_{kernels,dithered,gaussian,cluster_sum,lsh_hash}.py)
$python -m pytest "${kernels[@]}" -k gpu

if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck initcheck synccheck; do
        heading "compute-sanitizer $tool"
        compute-sanitizer --tool $tool --error-exitcode 1 \
            $python -m pytest "${kernels[@]}" -k "gpu and (given or special)"
    done
else
    echo "compute-sanitizer is not there: install it with the CUDA toolkit."
fi

if ((gpus > 1)); then
    heading "NCCL against gloo, every codec"
    .venv/bin/torchrun --standalone --nproc-per-node 2 -m tests.comm.on_gpus
    for options in none identity birdmoe "birdmoe --moe-a2a-chunks=2" "birdmoe --moe-a2a-dedup" \
        lsh; do
        heading "Training with $options"
        # shellcheck disable=SC2086 # options are words
        RANKS=2 bash scripts/run_local.sh --train-iters 50 --log-interval 10 --eval-interval 50 \
            --eval-iters 2 --moe-a2a-compress=$options 2>&1 | tee "runs/gpu/${options// /}.log"
    done
else
    echo "One GPU: exchanges by NCCL need two. Not tested."
fi

heading "Speed"
$python benchmarks/bench_codec.py --device cuda --codecs rq,dithered,gaussian --bits 2,3,4,6,8 \
    --dtypes bfloat16,float32 --json runs/gpu/codecs.json
$python benchmarks/bench_codec.py --device cuda --impl reference --dtypes bfloat16 \
    --json runs/gpu/references.json
$python benchmarks/bench_lsh.py --device cuda --tokens 8192 --dtypes bfloat16 --json runs/gpu/lsh.json

heading "The rest of the tests, on the CPU"
CUDA_VISIBLE_DEVICES='' $python -m pytest
