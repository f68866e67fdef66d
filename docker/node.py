"""What a node of compose.yaml does: meet the others on node 0 and train, by torchrun's API. Its host name is node<n>.

Node 0 holds a lock while it lives, by which the others know that the run has ended: however it ended, none outlasts
it; and none that has not failed ends before it, which would stop it under `up --exit-code-from node0`.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import shlex
import signal
import socket
import sys
import threading
import time
from pathlib import Path

LOCK = Path(os.environ["DTRAIN_CACHE"]) / "node0.lock"
DONE = Path("/tmp/done")  # for the health check: this node has nothing more to do
NODES = 4  # in compose.yaml
START_S = 60.0  # how long to wait for node 0 to start
MEET_S = 120  # and then for all nodes to meet
STOP_S = 50  # what ranks have to end after a signal; compose.yaml's stop_grace_period is a little longer
AFTER_S = 2.0  # how long after node 0 the others end
ORPHAN_S = 2.5  # or are ended, if their ranks still run
HOPELESS_S = 10.0  # how long node 0 may go on after another has failed, before that one ends
USAGE, FAILED = 2, 1  # exit status, as dtrain's


def main() -> int:
    host = socket.gethostname()
    node = int(host.removeprefix("node"))
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    if node == 0:  # the file is closed when this process is gone, not before
        fcntl.flock(os.open(LOCK, os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX)
    elif not _wait(START_S, alive=True):
        return FAILED
    try:
        nodes, ranks = _checked()
    except ValueError as mistake:
        status = USAGE
        if node == 0:
            print(f"dtrain: {mistake}", file=sys.stderr)
    else:
        status = _train(host, node, nodes, ranks) if node < nodes else 0
    DONE.touch()
    if node:
        _wait(HOPELESS_S if status else math.inf, alive=False)
        time.sleep(AFTER_S)
    return status


def _checked() -> tuple[int, int]:
    """NODES and PROCS. Raises ValueError."""
    asked = os.environ["NODES"], os.environ["PROCS"]
    if asked[0] not in map(str, range(1, NODES + 1)):
        raise ValueError(f"NODES={asked[0]}: compose.yaml has {NODES} nodes, use 1 to {NODES}")
    if not asked[1].isdecimal() or not int(asked[1]):
        raise ValueError(f"PROCS={asked[1]}: use the number of processes of each node, 1 or more")
    if not os.access("outputs", os.W_OK):
        raise ValueError(f"user {os.getuid()} cannot write the folder of the runs: let it be yours, and `export UID`")
    return int(asked[0]), int(asked[1])


def _train(host: str, node: int, nodes: int, ranks: int) -> int:
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a failing rank speaks for itself
    config = LaunchConfig(
        min_nodes=nodes, max_nodes=nodes, nproc_per_node=ranks, run_id="dtrain", rdzv_backend="c10d",
        rdzv_endpoint="node0:29400", rdzv_configs={"is_host": str(node == 0), "join_timeout": MEET_S},
        local_addr=host, max_restarts=0, logs_specs=DefaultLogsSpecs(), shutdown_timeout=STOP_S,
    )  # fmt: skip
    threads = max(1, len(os.sched_getaffinity(0)) // (nodes * ranks))  # all nodes are on this machine
    arguments = ["-u", "scripts/train.py", f"strategy={os.environ['STRATEGY']}", "logger=[default,tensorboard]",
                 f"launch.threads={threads}"]  # fmt: skip
    if run := os.environ["RUN"]:
        arguments.append(f"hydra.run.dir=outputs/{run}")
    if node:
        threading.Thread(target=_end_with_node0, daemon=True).start()
    try:
        elastic_launch(config, sys.executable)(*arguments, *shlex.split(os.environ["ARGS"]))
    except ChildFailedError as error:
        # Those that torchrun has stopped for another's failure are no reason.
        failures = [f for f in error.failures.values() if f.exitcode != -signal.SIGTERM] or [*error.failures.values()]
        first = min(failures, key=lambda failure: failure.timestamp)
        if first.exitcode > 0:  # it has said why
            return first.exitcode
        print(f"dtrain: local rank {first.local_rank} of {host} ended with signal {-first.exitcode}", file=sys.stderr)
    except SignalException as error:
        return 128 + error.sigval
    except RendezvousError as error:
        if node == 0:  # else it is gone, and has said why
            print(f"dtrain: NODES={nodes} did not meet within {MEET_S} s: {error}", file=sys.stderr)
    else:
        return 0
    return FAILED


def _wait(limit_s: float, *, alive: bool) -> bool:
    """Wait until node 0 is alive or has ended; no longer than the limit."""
    end = time.monotonic() + limit_s
    while _node0_is_alive() != alive:
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _node0_is_alive() -> bool:
    with LOCK.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _end_with_node0() -> None:
    _wait(math.inf, alive=False)
    time.sleep(ORPHAN_S)
    os._exit(FAILED)  # and so the container, with the ranks in it


if __name__ == "__main__":
    sys.exit(main())
