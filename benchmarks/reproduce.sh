#!/usr/bin/env bash
# Measures anew what README's tables of results are made of, and fills them in a copy of README.md:
#   bash benchmarks/reproduce.sh runs/reproduced
# Network namespaces need root, ip and tc. Two quiet cores take 45 minutes for the networks and two
# hours for quality; what is finished is not done again.
set -euo pipefail
mkdir -p "${1:?usage: bash benchmarks/reproduce.sh DIRECTORY}"/{network,lsh}
results=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
python=.venv/bin/python

network() { # FILE OPTIONS ...
    local file=$results/$1
    shift
    [[ -f $file ]] && return
    "$python" benchmarks/network.py --rates 200mbit,1gbit,none --steps 1 --json "$file.partial" "$@"
    mv "$file.partial" "$file"
}

all=none,identity,bf16,mxfp8,birdmoe,birdmoe-4,birdmoe-3
lsh=none,identity,mxfp8,birdmoe,lsh-20,lsh-20-rq4
few=none,mxfp8,birdmoe,birdmoe-3,lsh-20-rq4
# Four ranks have two cores: half the tokens of each keep their step as long.
network network/ep2.json --ranks 2 --routing balanced --methods $all --repeats 3
network network/ep4.json --ranks 4 --micro-batch-size 4 --routing balanced \
    --methods $all,lsh-20-rq4 --repeats 3 --settle 40
network network/real.json --ranks 4 --micro-batch-size 4 --routing real \
    --methods none,identity,birdmoe,birdmoe-4 --repeats 2
# Clustering comes to its rate after some 60 steps. What is in ep2.json, too, is a second run of it.
network lsh/ep2.json --ranks 2 --routing balanced --methods $lsh --repeats 3 --settle 60
network held-out-rate.json --ranks 2 --routing balanced --methods $few --repeats 2 --settle 20 \
    --rates 500mbit,none
network held-out-size.json --ranks 2 --routing balanced --methods $few --repeats 2 --settle 20 \
    --hidden-size 384
"$python" benchmarks/plan_accuracy.py "$results"/{network/ep2,network/ep4,lsh/ep2}.json \
    "$results"/held-out-*.json --held-out-rate 500mbit --held-out-rate 1gbit \
    --held-out-hidden 384 --json "$results/plan-accuracy.json"
"$python" benchmarks/quality.py --results "$results/quality"

cp README.md "$results/README.md"
"$python" benchmarks/readme_tables.py --readme "$results/README.md" --results "$results"
"$python" -m megatron_moe_comp.report "$results"/{network,quality} -o "$results/report.html"
