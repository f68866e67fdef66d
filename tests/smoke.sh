#!/usr/bin/env bash
# Runs as a user types them, from one process to eight; what is left behind is checked. Called by `make smoke`.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export DTRAIN_CACHE="$work/cache"

smoke() { # strategy, ranks, further settings
    .venv/bin/torchrun --standalone --nproc-per-node "$2" scripts/train.py strategy="$1" model=tiny \
        steps=6 eval.every=3 checkpoint.every=3 hydra.run.dir="$work/$1" "${@:3}"
    test -s "$work/$1/summary.json"
}
smoke ddp 2
smoke tensor 2 task=masked_lm
smoke 3d 8 precision=bf16_mixed
.venv/bin/python scripts/compare.py model=tiny steps=5 hydra.run.dir="$work/compare"
.venv/bin/python scripts/compare.py model=tiny steps=5 hydra.run.dir="$work/others" \
    'strategies=[single,allreduce,"hsdp launch.nproc=4","deepspeed_pipeline launch.nproc=4",accelerate_deepspeed,accelerate_local_sgd]'
.venv/bin/python scripts/info.py model=llama_70b
docker/smoke.sh
