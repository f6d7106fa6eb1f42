#!/usr/bin/env bash
# The ranks of one node of a SLURM job; started by launch.sh, through srun:
#   node.sh SCRIPT FLAGS ...
# SLURM sends TERM to every process of a node. The ranks then save and end (--exit-signal-handler of
# Megatron); torchrun must not take notice, as it would end them within half a minute.
set -euo pipefail

(
    trap '' TERM
    exec "$MOE_PYTHON" -m torch.distributed.run --signals-to-handle SIGINT,SIGHUP,SIGQUIT \
        --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$MOE_RANKS_PER_NODE" --max-restarts 0 \
        --rdzv-backend c10d --rdzv-endpoint "$MOE_HEAD:$MOE_PORT" \
        --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
        --log-dir "$MOE_LOGS/$SLURMD_NODENAME" --redirects 3 --tee 3 "$@"
) &
ranks=$!
trap 'touch "$MOE_LOGS/stopped"' TERM
status=0
while kill -0 "$ranks" 2> /dev/null; do # a trapped signal ends a wait, not the ranks
    status=0
    wait "$ranks" || status=$?
done
exit "$status"
