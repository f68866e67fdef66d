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
.venv/bin/dtrain compare model=tiny steps=5 hydra.run.dir="$work/engines" \
    'strategies=[single,allreduce,"hsdp launch.nproc=4",deepspeed_zero1,deepspeed_zero3,"deepspeed_pipeline launch.nproc=4",accelerate_ddp,accelerate_deepspeed,accelerate_local_sgd]'
.venv/bin/dtrain info model=llama_70b

# The package, in an environment that has what it requires and nothing else, outside the checkout.
.venv/bin/python -m build --outdir "$work/dist" . >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
.venv/bin/python -m venv "$work/venv"
install() {
    "$work/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt "$@"
}
install torch
install "$work"/dist/*.whl
(cd "$work" && venv/bin/dtrain compare model=tiny steps=3 hydra.run.dir=installed && test -s installed/report.html)
docker/smoke.sh
