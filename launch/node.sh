#!/bin/bash
# torchrun on one machine of a cluster, for a run that may be stopped and started again.
#
#   launch/node.sh FOLDER TORCHRUN'S_OPTIONS scripts/train.py OVERRIDES
#
# SIGTERM goes to the ranks alone: they write a checkpoint and end, and then torchrun ends. If torchrun got the signal, it
# would leave them 30 seconds, less at a second signal, and let the torchruns of other machines wait for it.
# The exit status is that of the rank that failed, or 75 (EX_TEMPFAIL) if the run was stopped and can go on.
folder=$(realpath -m "$1")
shift
written() { stat -c %y "$folder/resumable" 2> /dev/null; }

# torchrun checks nobody: any process that knows the rendezvous' name takes part. So the name is drawn once for a run, and
# is in a file that only its user can read, not in a command that all users of a machine see.
mkdir -p "$folder"
drawn=$(umask 077; mktemp "$folder/.meeting-XXXXXX") && od -An -N16 -tx1 /dev/urandom | tr -d ' \n' > "$drawn" || exit
ln -T "$drawn" "$folder/.meeting" 2> /dev/null  # of several machines one is the first
owner=$(stat -c %u "$drawn")  # as this folder shows it: a file server may give all files to one user
rm "$drawn"
if [ -L "$folder/.meeting" ] || [ ! -f "$folder/.meeting" ] || [ "$(stat -c %u "$folder/.meeting")" != "$owner" ]; then
    echo "launch/node.sh: $folder/.meeting is not a file of yours: remove it, or use another folder" >&2
    exit 2
fi
PET_RDZV_ID=$(cat "$folder/.meeting") || exit
export PET_RDZV_ID

before=$(written)  # by an earlier run that was stopped
trap '' TERM       # torchrun inherits that, and its ranks, until they listen
case " $* " in  # it goes on with what is in its folder, unless a setting says otherwise
    *" resume="* | *" overwrite="*) ;;
    *) set -- "$@" resume=auto ;;
esac
python -m dtrain.launch.agent --signals-to-handle=SIGINT "$@" hydra.run.dir="$folder" &
torchrun=$!
stop= without=0
trap 'stop=yes' TERM
while kill -0 "$torchrun" 2> /dev/null; do
    if [ "$stop" ]; then  # again and again, until ranks handle it; after 10 s without ranks torchrun waits in vain
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
if [ "$stop" ] && [ "$status" != 0 ] && [ -e "$folder/checkpoints/latest" ]; then  # between two attempts
    exit 75
fi
exit "$status"
