# Sourced by the templates beside it: starts the training on all nodes of a job, and sees to it that
# the job can be stopped at any time and goes on where it was.
#
# On USR1, which SLURM sends five minutes before the time is over, and on TERM, which it sends before
# it takes the nodes away, every rank saves a checkpoint and ends; then the job is queued again.
# shellcheck shell=bash
# shellcheck disable=SC2154  # SCRIPT, DATA, ... are the templates'
set -euo pipefail

config=${1:?usage: sbatch TEMPLATE CONFIG.args [FLAGS ...]}
shift
[[ -f $config ]] || { echo "$config: there is no such file of flags. Choose one of configs/." >&2 && exit 2; }
mapfile -t configured < <(sed 's/#.*//' "$config" | xargs -n 1)

if [[ -z $IMAGE && "$*" != *-path* && "$*" != *--mock-data* ]]; then
    for ((i = 0; i + 1 < ${#DATA[@]}; i += 2)); do
        [[ ${DATA[i]} == *-path || ${DATA[i]} == --tokenizer-model ]] || continue
        [[ -e ${DATA[i + 1]} || -e ${DATA[i + 1]}.idx ]] && continue
        echo "${DATA[i]} ${DATA[i + 1]}: is not there. Prepare it, or set DATA_PATH and TOKENIZER." >&2
        exit 2
    done
fi
if [[ -z $IMAGE ]] && ! command -v "$PYTHON" > /dev/null; then
    echo "$PYTHON: is not there. Run scripts/setup.sh, or set PYTHON." >&2
    exit 2
fi

export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1 # a rank that waits for one that died ends
export CUDA_DEVICE_MAX_CONNECTIONS=1     # Megatron overlaps communication and computing
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
if [[ -n $INTERFACE ]]; then
    export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE
fi
# What every node starts; see node.sh.
export MOE_PYTHON=$PYTHON MOE_LOGS=$RESULTS/logs/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
export MOE_HEAD=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MOE_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export MOE_RANKS_PER_NODE=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}

[[ $SCRIPT == */* ]] || SCRIPT=${CODE:-.}/$SCRIPT # one of ours; others are named by their path
container=()
if [[ -n $IMAGE ]]; then
    container=(--container-image "$IMAGE" --container-mounts "$MOUNTS" --container-workdir "$PWD")
fi
mkdir -p "$MOE_LOGS"
echo "Start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST: $SCRIPT $config $*"
srun --kill-on-bad-exit=1 "${container[@]}" bash "${CODE:-.}/scripts/slurm/node.sh" "$SCRIPT" \
    "${configured[@]}" "${DATA[@]}" \
    --save "$RESULTS/checkpoints" --load "$RESULTS/checkpoints" --save-interval "$SAVE_INTERVAL" \
    --exit-signal-handler --tensorboard-dir "$RESULTS/tensorboard" \
    --moe-a2a-stats-jsonl "$RESULTS/a2a.jsonl" "$@" &
step=$!

# SLURM tells the nodes, this script, or both.
trap 'scancel --signal=TERM "$SLURM_JOB_ID.0" || true' USR1 TERM
status=0
while kill -0 "$step" 2> /dev/null; do # a trapped signal ends a wait, not the step
    status=0
    wait "$step" || status=$?
done
if [[ -f $MOE_LOGS/stopped && $status == 0 ]]; then
    echo "Told to stop, and saved. The job is queued again."
    scontrol requeue "$SLURM_JOB_ID" || true # SLURM may have done it itself
fi
exit "$status"
