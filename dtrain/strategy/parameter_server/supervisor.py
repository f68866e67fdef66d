"""A worker's process, as its rank looks after it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time

from torch.distributed import Store

from dtrain.launch.rank_processes import PRELOADED, run_and_exit_with_parent
from dtrain.strategy.parameter_server.protocol import OVER, Life
from dtrain.strategy.parameter_server.worker import run_worker


def supervise(worker: int, restarts: int, store: Store, *arguments: object) -> None:
    """Start the worker's process, again where it dies, and return when all work is over.

    Args:
        restarts: how often it is started again.
        store: in which the worker's lives are told, see `Life`.
        arguments: of `run_worker`, but for the number of the life.
    """
    log, context = logging.getLogger("dtrain"), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    for number in range(restarts + 1):
        life = Life(worker, number)
        process = context.Process(
            target=run_and_exit_with_parent, args=(os.getpid(), run_worker, *arguments, number)
        )
        process.start()
        log.info("worker %d, process %d", worker, process.pid)
        while process.exitcode is None:
            process.join(1.0)
            if process.exitcode is None and store.check([life.lost]):
                process.kill()  # it was silent for too long: stopped, perhaps
        if process.exitcode == 0:
            break
        log.warning("worker %d ended with %s", worker, process.exitcode)
        store.set(life.ended, "")
    else:
        store.set(life.gone, "")
    while not store.check([OVER]):  # whatever comes next is for all ranks together
        time.sleep(0.2)
