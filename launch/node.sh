#!/bin/bash
# torchrun on one machine of a cluster, for a run that may be stopped and started again.
#
#   launch/node.sh FOLDER TORCHRUN'S_OPTIONS scripts/train.py OVERRIDES
#
# SIGTERM goes to the ranks alone: they write a checkpoint and end, and so torchrun does. Told itself, torchrun would
# leave them 30 seconds, less at a second signal, and let the torchruns of other machines wait for it.
# The exit status is that of the rank that failed, or 75 (EX_TEMPFAIL) if the run was stopped and can go on.
folder=$(realpath -m "$1")
shift
written() { stat -c %y "$folder/resumable" 2> /dev/null; }

# torchrun asks nobody who they are: whoever knows the rendezvous' name takes part. It is drawn once for a run, and stands
# in a file of its user's alone, not in a command that all users of a machine see.
mkdir -p "$folder"
drawn=$(umask 077; mktemp "$folder/.meeting-XXXXXX") && od -An -N16 -tx1 /dev/urandom | tr -d ' \n' > "$drawn" || exit
ln -T "$drawn" "$folder/.meeting" 2> /dev/null  # of several machines one is the first
owner=$(stat -c %u "$drawn")  # as this folder tells it: a server of files may give all of them to one user
rm "$drawn"
if [ -L "$folder/.meeting" ] || [ ! -f "$folder/.meeting" ] || [ "$(stat -c %u "$folder/.meeting")" != "$owner" ]; then
    echo "launch/node.sh: $folder/.meeting is not a file of yours: remove it, or use another folder" >&2
    exit 2
fi
PET_RDZV_ID=$(cat "$folder/.meeting") || exit
export PET_RDZV_ID

before=$(written)  # by an earlier run that was stopped
trap '' TERM       # torchrun inherits that, and its ranks, until they listen
case " $* " in  # it goes on with what is in its folder, unless it is told otherwise
    *" resume="* | *" overwrite="*) ;;
    *) set -- "$@" resume=auto ;;
esac
python -m dtrain.launch.agent --signals-to-handle=SIGINT "$@" hydra.run.dir="$folder" &
torchrun=$!
told= without=0
trap 'told=yes' TERM
while kill -0 "$torchrun" 2> /dev/null; do
    if [ "$told" ]; then  # again and again, until they listen; long without any it waits for somebody who will not come
        kill -TERM $(cat "/proc/$torchrun/task/"*/children) 2> /dev/null && without=0 || without=$((without + 1))
        [ "$without" -lt 10 ] || kill -KILL "$torchrun"
    fi
    sleep 1
done
wait "$torchrun" 2> /dev/null
status=$?
after=$(written)
if [ "$after" ] && [ "$after" != "$before" ]; then
    exit 75
fi
if [ "$told" ] && [ "$status" != 0 ] && [ -e "$folder/checkpoints/latest" ]; then  # between two attempts
    exit 75
fi
exit "$status"
