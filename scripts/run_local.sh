#!/usr/bin/env bash
# Trains a small MoE model with a compressed expert all-to-all on this machine, from nothing: installs,
# prepares data from the sources of Python's standard library and trains on 2 ranks, or 1 per GPU.
#   bash scripts/run_local.sh [any pretrain_gpt_moe.py arguments]      pretrain GPT-MoE on the text
#   bash scripts/run_local.sh t5 [any finetune_t5_moe.py arguments]    fine-tune T5-MoE on a task
#   bash scripts/run_local.sh --moe-a2a-compress=none --train-iters 50
# RANKS=4 sets the number of ranks; results go to runs/local.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

kind=gpt
if [[ ${1:-} == t5 || ${1:-} == gpt ]]; then
    kind=$1
    shift
fi
bash scripts/setup.sh

experts=8
gpus=0
if command -v nvidia-smi > /dev/null; then
    gpus=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())')
fi
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}
expert_parallel=$ranks
while ((experts % expert_parallel || ranks % expert_parallel)); do ((expert_parallel--)); done

# One thread per rank's share of the cores; more only make them wait for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((gpus > 0 || $(nproc) <= ranks ? 1 : $(nproc) / ranks))}
export CUDA_DEVICE_MAX_CONNECTIONS=1
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore}

model=(
    --num-layers 2 --num-attention-heads 4
    --normalization RMSNorm --swiglu --disable-bias-linear
    --attention-dropout 0 --hidden-dropout 0
    --num-experts "$experts" --moe-router-topk 2 --moe-token-dispatcher-type alltoall
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
    --expert-model-parallel-size "$expert_parallel"
)
training=(
    --min-lr 1e-5 --lr-decay-style cosine --lr-warmup-fraction 0.1
    --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0 --log-interval 100
)
# Two ranks have one link each way: there is no load to even out.
compression=(
    --moe-a2a-compress=birdmoe --moe-a2a-bit-policy=uniform
    --moe-a2a-stats-json runs/local/a2a.json --moe-a2a-stats-jsonl runs/local/a2a.jsonl
)

if [[ $kind == gpt ]]; then
    script=pretrain_gpt_moe.py data=data/stdlib suffix=
    .venv/bin/python -m megatron_moe_comp.data.prepare --vocab-size 1024 --output-prefix "$data"
    model+=(
        --hidden-size 256 --ffn-hidden-size 128 --position-embedding-type rope
        --seq-length 128 --max-position-embeddings 128
    )
    training+=(
        --micro-batch-size 4 --global-batch-size $((4 * ranks)) --train-iters 1000 --lr 1e-3
        --eval-interval 500 --eval-iters 160 --data-cache-path "${data}_cache"
    )
else
    script=finetune_t5_moe.py data=data/stdlib_pairs suffix=.jsonl
    .venv/bin/python -m megatron_moe_comp.data.prepare_pairs --output-prefix "$data"
    # T5's weights start larger than Megatron's default, without which it hardly learns in minutes.
    model+=(
        --hidden-size 128 --ffn-hidden-size 128 --t5-relative-positions --init-method-std 0.08
        --moe-layer-freq 2
        --encoder-seq-length 96 --decoder-seq-length 32 --max-position-embeddings 96
    )
    training+=(
        --micro-batch-size 16 --global-batch-size $((16 * ranks)) --train-iters 500 --lr 2e-3
        --eval-interval 250 --eval-iters 10 --predictions-jsonl runs/local/predictions.jsonl
    )
fi
inputs=(
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "${data}_tokenizer.model"
    --train-data-path "${data}_train$suffix" --valid-data-path "${data}_valid$suffix"
    --test-data-path "${data}_test$suffix" --num-workers 1
)
if ((gpus > 0)); then
    model+=(--bf16)
    if ! .venv/bin/python -c 'import transformer_engine' 2> /dev/null; then
        model+=(--transformer-impl local --no-persist-layer-norm --no-masked-softmax-fusion
            --no-gradient-accumulation-fusion --no-rope-fusion)
    fi
fi

run=(.venv/bin/python -m torch.distributed.run --standalone --nproc-per-node "$ranks" "$script"
    "${model[@]}" "${training[@]}" "${inputs[@]}" "${compression[@]}" "$@")
if [[ $kind == t5 ]]; then
    before=runs/local/before.log
    mkdir -p "$(dirname "$before")"
    if ! "${run[@]}" --skip-train > "$before" 2>&1; then
        cat "$before"
        exit 1
    fi
    echo "Before training (all of it in $before):"
    grep -E "answers to|validation loss" "$before"
fi
exec "${run[@]}"
