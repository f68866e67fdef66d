#!/usr/bin/env bash
# Train on nodes that are containers of this machine, by compose.yaml: docs/docker.md.
#
#   docker/train.sh [SETTINGS]      NODES=2 PROCS=2 docker/train.sh strategy=fsdp model=tiny steps=20
#
# By environment: NODES (1 to 4), PROCS (of each node), RUN (the run's name, for its folder: used again it goes on),
# OUTPUTS (the folder of the runs), RUN_AS (the number of the user whose they are), and what compose.yaml names.
# The exit status is the run's: 0, 2 for a mistake, 1 for a run that broke off, 75 for one that was stopped and can go on.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)

refuse() {
    echo "docker/train.sh: $*" >&2
    exit 2
}

docker info >/dev/null 2>&1 || refuse "no Docker engine answers, or not to you: $(docker info 2>&1 | tail -n 1)"
for words in "${COMPOSE:-docker compose}" docker-compose; do
    read -ra compose <<<"$words"
    "${compose[@]}" version >/dev/null 2>&1 && break || compose=()
done
[[ ${compose[*]} ]] || refuse "neither docker compose nor docker-compose is installed"

export NODES=${NODES:-2} PROCS=${PROCS:-2} RUN=${RUN:-$(date +%Y-%m-%d_%H-%M-%S)-$RANDOM}
[[ $NODES =~ ^[1-4]$ ]] || refuse "NODES=$NODES: compose.yaml has 4 nodes, use 1 to 4"
[[ $PROCS =~ ^[1-9][0-9]?$ ]] || refuse "PROCS=$PROCS: use the number of processes of each node, 1 to 99"
[[ $RUN =~ ^[A-Za-z0-9][A-Za-z0-9_.-]*$ ]] || refuse "RUN=$RUN: use letters, digits and _.- for the name of a run"

# Whose the runs are: nothing trains as root.
OUTPUTS=$(realpath -m "${OUTPUTS:-$here/outputs}")
mkdir -p "$OUTPUTS" || refuse "OUTPUTS=$OUTPUTS cannot be made"
RUN_AS=${RUN_AS:-$(id -u)}
[[ $RUN_AS =~ ^(0|[1-9][0-9]*)$ ]] || refuse "RUN_AS=$RUN_AS: use the number of a user, as id -u tells it"
owner=$(stat -c %u "$OUTPUTS")
((RUN_AS)) || RUN_AS=$owner # root trains for whoever owns the folder
((RUN_AS)) || refuse "nothing trains as root, and $OUTPUTS is root's: give it to a user (chown 1000 $OUTPUTS), who trains then"
[[ $owner == "$RUN_AS" || $(stat -c %A "$OUTPUTS") == *w? ]] || refuse "user $RUN_AS cannot write $OUTPUTS, which is $(
    ((owner)) && echo "user $owner's: RUN_AS=$owner" || echo "root's: chown $RUN_AS $OUTPUTS"), or another OUTPUTS"
export OUTPUTS RUN_AS

# One project for each run, of whichever clone: another one's containers are never touched.
COMPOSE_PROJECT_NAME=dtrain-$(printf %s "$OUTPUTS/$RUN" | sha256sum | head -c 12)
export COMPOSE_PROJECT_NAME
dc() { "${compose[@]}" --file "$here/compose.yaml" "$@"; }
one_of_run() { docker ps --format '{{.Names}}' --filter "label=com.docker.compose.project=$COMPOSE_PROJECT_NAME" | sort | head -n 1; }
# One start at a time: between this question and `up`, by which others see the run, the image may have to be built.
exec {starting}<"$OUTPUTS"
flock --nonblock $starting || { echo "docker/train.sh: waiting for another start in $OUTPUTS" >&2 && flock $starting; }
[[ ! $(one_of_run) ]] ||
    refuse "RUN=$RUN is being trained: wait for it, stop it (docker stop -t 60 $(one_of_run)), or name another RUN"

# Settings stand in one variable, each in quotes of the shell's.
((!$#)) || ARGS="${ARGS:-}$(printf ' %q' "$@")"
export ARGS=${ARGS:-}
names=()
for ((node = 0; node < NODES; node++)); do names+=("node$node"); done
echo "docker/train.sh: $RUN, in $OUTPUTS/$RUN"
said=$OUTPUTS/$RUN/resumable
before=$(stat -c %y "$said" 2>/dev/null)

end() { # told to: every rank writes its checkpoint, which takes as long as it takes
    echo "docker/train.sh: stopping the ranks of $RUN" >&2
    docker stop --time 60 "$(one_of_run)" >/dev/null 2>&1
}
docker image inspect "${IMAGE:-dtrain}" >/dev/null 2>&1 || dc build node0 || exit 1
problem=$(dc up --detach --no-build "${names[@]}" 2>&1) || {
    echo "$problem" >&2
    dc down >/dev/null 2>&1
    exit 1
}
exec {starting}<&-
mapfile -t containers < <(for name in "${names[@]}"; do dc ps --quiet "$name"; done)
trap end INT TERM HUP
setsid docker logs --follow "${containers[0]}" & # not of the terminal: Ctrl-C is for the ranks
log=$!
statuses=$(mktemp)
setsid docker wait "${containers[@]}" >"$statuses" &
while kill -0 $! 2>/dev/null; do wait $!; done # a signal ends `wait`, not what it waits for
mapfile -t ended <"$statuses"
rm "$statuses"
wait "$log" 2>/dev/null
first=
for ((node = 0; node < NODES; node++)); do
    # Rank 0 speaks for all; what another node says of its own end is worth reading where rank 0 made no mistake.
    ((node == 0 || ended[node] == 0 || ended[node] == 75 || ended[0] == 2)) || docker logs --tail 3 "${containers[node]}"
    ((ended[node] < 128)) || echo "docker/train.sh: node$node was ended by signal $((ended[node] - 128))$(
        [[ $(docker inspect --format '{{.State.OOMKilled}}' "${containers[node]}") != true ]] || echo ': out of memory')" >&2
    ((ended[node] == 0 || ended[node] == 75)) || first=${first:-${ended[node]}}
done
trap '' INT TERM HUP
dc down >/dev/null 2>&1 # data that were prepared stay
after=$(stat -c %y "$said" 2>/dev/null)
if [[ $after && $after != "$before" ]]; then
    echo "docker/train.sh: stopped; resumable: the same command with RUN=$RUN goes on" >&2
    first=75
elif [[ $first && $first != 2 && -e $OUTPUTS/$RUN/checkpoints/latest ]]; then
    echo "docker/train.sh: broken off; resumable: the same command with RUN=$RUN goes on from the last checkpoint" >&2
fi
((${first:-0} < 128)) || first=1
exit "${first:-0}"
