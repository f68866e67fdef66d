#!/usr/bin/env bash
# Train by compose.yaml on one, two and three nodes and hold the losses to each other, as docs/docker.md describes.
# All of it happens in a folder and under names of its own, which are removed at the end. By environment:
#   BASE       base image; if it cannot be had, debootstrap and what this machine's pip gets stand in
#   COMPOSE    docker-compose or "docker compose": whichever is there
#   REQUIRE=1  fail where it cannot be run, instead of saying why
#   KEEP=1     remove nothing
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
touch "$work/log"
export COMPOSE_PROJECT_NAME=dtrain-smoke-$$ IMAGE=dtrain-smoke-$$ OUTPUTS=$work/outputs
export BASE=${BASE:-python:3.11-slim-bookworm} TENSORBOARD_PORT=${TENSORBOARD_PORT:-16006}
export ARGS="model=tiny model.n_heads=6 model.d_model=96 steps=8 checkpoint.every=4"
user=$(id -u)
((user)) || user=1000 # nothing trains as root
compose=() engine=

dc() { env UID="$user" "${compose[@]}" --file "$work/docker/compose.yaml" "$@"; }

not_run() {
    echo "docker/smoke.sh: not run: $1"
    exit "${REQUIRE:-0}"
}

clean() {
    status=$?
    set +e
    ((status == 0)) || tail -n 20 "$work/log" >&2
    if [[ ${KEEP:-} ]]; then
        echo "kept: $work, $IMAGE, $COMPOSE_PROJECT_NAME"
    elif [[ -d $work/docker ]]; then
        echo "== removing"
        dc --profile tensorboard down --volumes --timeout 5 >/dev/null 2>&1
        docker rmi --force "$IMAGE" >/dev/null 2>&1
        docker image prune --force --filter label=org.opencontainers.image.title=dtrain >/dev/null
        docker rmi --force "$IMAGE-base" >/dev/null 2>&1 # after what was built on it
    fi
    if [[ $engine ]]; then kill "$engine" && wait "$engine"; fi
    [[ ${KEEP:-} ]] || rm -rf "$work"
    exit $status
}
trap clean EXIT

# An engine, and a compose.
command -v docker >/dev/null || not_run "docker is not installed"
if ! docker info >/dev/null 2>&1; then
    [[ $(id -u) == 0 ]] && command -v dockerd >/dev/null || not_run "no Docker engine answers, and none can be started"
    dockerd >"$work/engine" 2>&1 &
    engine=$!
    for _ in {1..30}; do docker info >/dev/null 2>&1 && break || sleep 1; done
    docker info >/dev/null 2>&1 || not_run "dockerd does not start: $(tail -n 1 "$work/engine")"
fi
for words in "${COMPOSE:-docker compose}" docker-compose; do
    read -ra compose <<<"$words"
    "${compose[@]}" version >/dev/null 2>&1 && break || compose=()
done
[[ ${compose[*]} ]] || not_run "neither docker compose nor docker-compose is installed"
docker buildx version >/dev/null 2>&1 || export DOCKER_BUILDKIT=0

# The image.
mkdir "$work/docker" "$OUTPUTS"
((UID)) || chown "$user" "$OUTPUTS"
cp -r .dockerignore pyproject.toml constraints.txt configs dtrain hydra_plugins scripts "$work"
cp -r docker/{Dockerfile,compose.yaml,node.py,wheels} "$work/docker"
if ! docker image inspect "$BASE" >/dev/null 2>&1 && ! docker pull --quiet "$BASE" >/dev/null 2>&1; then
    command -v debootstrap >/dev/null || not_run "$BASE cannot be pulled, and there is no debootstrap to stand in"
    [[ $(python3 -V) == "Python 3.11."* ]] || not_run "$BASE cannot be pulled, and its stand-in needs Python 3.11 here"
    echo "== $BASE cannot be pulled: debootstrap stands in"
    debootstrap --variant=minbase --include=python3-venv bookworm "$work/base" >"$work/log" 2>&1
    BASE=$IMAGE-base
    tar -C "$work/base" -c . | docker import - "$BASE" >/dev/null
    mkdir "$work/requirements"
    cp pyproject.toml "$work/requirements"
    touch "$work/requirements/"{README.md,LICENSE}
    python3 -m pip wheel --quiet --constraint constraints.txt --wheel-dir "$work/docker/wheels" \
        'setuptools>=77' torch "$work/requirements[tensorboard]" >"$work/log" 2>&1
fi
echo "== building"
dc build >"$work/log" 2>&1
docker image inspect --format "image: {{.Size}} bytes, user {{.Config.User}}" "$IMAGE"

# The runs.
train() { # name, strategy, nodes, processes of each
    echo "== $2 on $3 x $4"
    RUN=$1 STRATEGY=$2 NODES=$3 PROCS=$4 timeout 300 env UID="$user" "${compose[@]}" \
        --file "$work/docker/compose.yaml" up --no-color --exit-code-from node0 | tee "$work/log"
    ! grep -E '^(.*_)?node[1-9].*\|' "$work/log" || { echo "another node than node 0 speaks"; exit 1; }
    test -s "$OUTPUTS/$1/summary.json" && test -e "$OUTPUTS/$1/checkpoints/latest"
    [[ $(stat -c %u "$OUTPUTS/$1/summary.json") == "$user" ]]
    for container in $(dc ps --all --quiet 2>/dev/null || dc ps --quiet); do
        docker inspect --format '{{.Config.User}} {{.HostConfig.PortBindings}}' "$container"
    done | sort -u | diff - <(echo "$user:$user map[]")
}
train single single 1 1
train ddp ddp 2 2
train tensor tensor 3 1
python3 - "$OUTPUTS" <<'EOF'
import json, pathlib, sys

def losses(run):
    lines = (pathlib.Path(sys.argv[1]) / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]

one = losses("single")
for run in "ddp", "tensor":
    worst = max(abs(a - b) / b for a, b in zip(losses(run), one, strict=True))
    print(f"{run}: {len(one)} losses, the greatest relative difference from one process is {worst:.1e}")
    assert len(one) == 8 and worst <= 1e-5
EOF

# A mistake ends with its own status; TensorBoard answers on loopback.
echo "== a mistake"
STRATEGY=nonsense dc up --no-color --exit-code-from node0 >"$work/log" 2>&1 && exit 1 || [[ $? == 2 ]]
grep "dtrain: unknown strategy" "$work/log" | cut -c 1-100
echo "== TensorBoard"
dc --profile tensorboard up -d tensorboard >"$work/log" 2>&1
for _ in {1..30}; do
    runs=$(python3 -c "import urllib.request as u; print(u.urlopen('http://127.0.0.1:$TENSORBOARD_PORT/data/runs').read())" \
        2>/dev/null) && [[ $runs == *tensor/tensorboard* ]] && break || sleep 1
done
echo "$runs"
[[ $(docker ps --filter "name=$COMPOSE_PROJECT_NAME" --format '{{.Ports}}') == "127.0.0.1:$TENSORBOARD_PORT->6006/tcp" ]]
echo "docker/smoke.sh: passed"
