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
export IMAGE=dtrain-smoke-$$ OUTPUTS=$work/outputs
export BASE=${BASE:-python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b} TENSORBOARD_PORT=${TENSORBOARD_PORT:-16006}
export ARGS="model=tiny model.n_heads=6 model.d_model=96 steps=8 checkpoint.every=4"
RUN_AS=$(id -u)
((RUN_AS)) || RUN_AS=1000 # nothing trains as root
export RUN_AS
compose=() engine=

tensorboard() { COMPOSE_PROJECT_NAME=$IMAGE "${compose[@]}" --file "$work/docker/tensorboard.yaml" "$@"; }

not_run() {
    echo "docker/smoke.sh: not run: $1"
    exit "${REQUIRE:-0}"
}

clean() {
    status=$?
    set +e
    ((status == 0)) || tail -n 20 "$work/log" >&2
    if [[ ${KEEP:-} ]]; then
        echo "kept: $work, $IMAGE"
    elif [[ -d $work/docker ]]; then
        echo "== removing"
        tensorboard down --timeout 5 >/dev/null 2>&1
        docker rmi --force "$IMAGE" >/dev/null 2>&1
        docker image prune --force --filter label=dtrain.image="$IMAGE" >/dev/null # the stages of this one
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
((UID)) || chown "$RUN_AS" "$OUTPUTS"
((UID)) || chmod 755 "$work" # TensorBoard is nobody's
cp -r .dockerignore pyproject.toml constraints.txt configs dtrain hydra_plugins launch scripts "$work"
cp -r docker/{Dockerfile,compose.yaml,tensorboard.yaml,train.sh,entrypoint.sh,requirements.lock,wheels} "$work/docker"
if ! docker image inspect "$BASE" >/dev/null 2>&1 && ! docker pull --quiet "$BASE" >/dev/null 2>&1; then
    command -v debootstrap >/dev/null || not_run "$BASE cannot be pulled, and there is no debootstrap to stand in"
    [[ $(python3 -V) == "Python 3.11."* ]] || not_run "$BASE cannot be pulled, and its stand-in needs Python 3.11 here"
    echo "== $BASE cannot be pulled: debootstrap stands in"
    debootstrap --variant=minbase --include=python3-venv bookworm "$work/base" >"$work/log" 2>&1
    BASE=$IMAGE-base
    tar -C "$work/base" -c . | docker import - "$BASE" >/dev/null
    mkdir -p "$work/requirements/dtrain"
    cp pyproject.toml "$work/requirements"
    cp dtrain/__init__.py "$work/requirements/dtrain" # it has the version
    touch "$work/requirements/"{README.md,LICENSE}
    python3 -m pip wheel --quiet --constraint constraints.txt --wheel-dir "$work/docker/wheels" \
        'setuptools>=77' torch "$work/requirements[tensorboard]" >"$work/log" 2>&1
fi
echo "== building"
RUN=build "${compose[@]}" --file "$work/docker/compose.yaml" build node0 >"$work/log" 2>&1
docker image inspect --format "image: {{.Size}} bytes, user {{.Config.User}}" "$IMAGE"

# The runs.
train() { # name, strategy, nodes, processes of each
    echo "== $2 on $3 x $4"
    RUN=$1 STRATEGY=$2 NODES=$3 PROCS=$4 timeout 300 "$work/docker/train.sh" >"$work/log" 2>&1 &
    local containers='' waiting=$!
    while kill -0 $waiting 2>/dev/null; do # what stands there while it runs
        containers+=$'\n'$(docker ps --filter "ancestor=$IMAGE" --format '{{.Names}}' | xargs -r docker inspect --format \
            '{{.Config.User}} {{.HostConfig.PortBindings}} {{.HostConfig.Memory}} {{.HostConfig.PidsLimit}}' 2>/dev/null)
        sleep 1
    done
    wait $waiting && cat "$work/log"
    ! grep -E 'Traceback|signal' "$work/log" || { echo "something broke off"; exit 1; }
    test -s "$OUTPUTS/$1/summary.json" && test -e "$OUTPUTS/$1/checkpoints/latest"
    [[ $(stat -c %u "$OUTPUTS/$1/summary.json") == "$RUN_AS" ]]
    diff <(grep . <<<"$containers" | sort -u) <(echo "$RUN_AS:$RUN_AS map[] 4294967296 1024")
    [[ ! $(docker ps --all --quiet --filter "ancestor=$IMAGE") ]] || { echo "a container is left"; exit 1; }
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

# A mistake ends with its own status; a stopped run goes on; nobody trains in a run that goes on, or as root.
echo "== mistakes"
said() { # status, words, command
    set +e
    "${@:3}" >"$work/log" 2>&1
    local status=$?
    set -e
    [[ $status == "$1" ]] && grep -- "$2" "$work/log" | cut -c 1-120 && ! grep Traceback "$work/log"
}
said 2 "dtrain: unknown strategy" env STRATEGY=nonsense "$work/docker/train.sh"
said 2 "nothing trains as root" env RUN_AS=0 OUTPUTS=/ "$work/docker/train.sh"
said 2 "nothing trains as root" docker run --rm --user 0 "$IMAGE" true
said 1 "start it by docker/train.sh" env -u RUN_AS "${compose[@]}" --file "$work/docker/compose.yaml" up
echo "== a node that is stopped"
ARGS="model=tiny steps=100000 eval.every=0" RUN=stopped "$work/docker/train.sh" >"$work/stopped" 2>&1 &
going=$!
for _ in {1..120}; do (($(cat "$OUTPUTS/stopped/metrics.jsonl" 2>/dev/null | wc -l) > 20)) && break || sleep 1; done
said 2 "RUN=stopped is being trained" env RUN=stopped "$work/docker/train.sh"
for node in 0 1; do # who listens there on all interfaces: torchrun's rendezvous on node 0 and its store for the ranks, nobody else
    name=$(docker ps --filter "ancestor=$IMAGE" --format '{{.Names}}' | grep "node$node")
    everywhere=$(docker exec "$name" sh -c 'cat /proc/net/tcp /proc/net/tcp6' | awk '$4 == "0A" && $2 ~ /^0+:/ { print $2 }')
    ports=$(for each in $everywhere; do echo $((16#${each##*:})); done | sort -nu | tr '\n' ' ')
    echo "node$node listens on all interfaces at: ${ports:-no port}"
    [[ $ports =~ ^$( ((node)) || echo '29400 [0-9]+ ')$ ]]
done
began=$SECONDS
docker stop --time 60 "$(docker ps --filter "ancestor=$IMAGE" --format '{{.Names}}' | grep node1)" >/dev/null
set +e
wait $going
[[ $? == 75 ]] || { cat "$work/stopped"; exit 1; }
set -e
grep "stopped after step" "$work/stopped" | tail -n 1 | cut -c 1-120
((SECONDS - began < 60))
steps=$(wc -l <"$OUTPUTS/stopped/metrics.jsonl")
ARGS="model=tiny steps=$((steps + 5)) eval.every=0" RUN=stopped "$work/docker/train.sh" >"$work/log" 2>&1
[[ $(wc -l <"$OUTPUTS/stopped/metrics.jsonl") == $((steps + 5)) ]]

echo "== TensorBoard"
tensorboard up -d >"$work/log" 2>&1
for _ in {1..30}; do
    runs=$(python3 -c "import urllib.request as u; print(u.urlopen('http://127.0.0.1:$TENSORBOARD_PORT/data/runs').read())" \
        2>/dev/null) && [[ $runs == *tensor/tensorboard* ]] && break || sleep 1
done
echo "$runs"
[[ $(docker ps --filter "ancestor=$IMAGE" --format '{{.Ports}}') == "127.0.0.1:$TENSORBOARD_PORT->6006/tcp" ]]
echo "docker/smoke.sh: passed"
