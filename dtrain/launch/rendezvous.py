"""Let the ranks of a job find each other, and form the process group.

torchrun keeps one store for all its attempts at a job. Ranks that it has restarted would read in it
the addresses of the dead ones. So the ranks of an attempt first agree on a name, and write below
it.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from dtrain.launch.collectives import all_gather_object
from dtrain.launch.flight_recorder import collective_failed
from dtrain.launch.rank_processes import MEETING
from dtrain.launch.world import World, cores

TIMEOUTS = ("default_pg_timeout", "default_pg_nccl_timeout")
NOTES = 4096  # collectives that torch's flight recorder remembers


@contextmanager
def process_group(
    world: World, device: torch.device, *, threads: int | None, timeout_s: float
) -> Iterator[None]:
    """Set this process's threads and device, and join the process group for the context.

    Afterwards the environment is as before: Accelerate and DeepSpeed leave RANK and WORLD_SIZE in
    it, and the next run of a sweep would take itself for a rank.

    Raises:
        ValueError: the rendezvous' port is taken, or nobody answers there.
    """
    threads_before = torch.get_num_threads()
    defaults = {name: getattr(dist.distributed_c10d, name) for name in TIMEOUTS}
    environment = dict(os.environ)
    torch.set_num_threads(threads or max(1, cores() // world.local_size))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.init()  # type: ignore[no-untyped-call]
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(NOTES))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    try:
        for name in TIMEOUTS:  # for groups that are made later
            setattr(dist.distributed_c10d, name, timeout)
        store = _store(world, timeout)
        dist.init_process_group(
            backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout
        )
    except RuntimeError as error:
        if not collective_failed(error):
            raise
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if "EADDRINUSE" in str(error):
            raise ValueError(
                f"port in use: {address} is taken; set MASTER_PORT (torchrun --master-port) to a "
                f"free one"
            ) from error
        raise ValueError(
            f"rank {world.rank} found no rendezvous at {address}: {str(error).splitlines()[0]}"
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads_before)
        for name, value in defaults.items():
            setattr(dist.distributed_c10d, name, value)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


def _store(world: World, timeout: timedelta) -> Store:
    """Return a store that only the ranks of this attempt share."""
    if world.size == 1:
        return dist.HashStore()  # no port: nobody to find
    if file := os.environ.get(MEETING):
        return dist.FileStore(file, world.size)
    shared, *_ = next(rendezvous("env://", timeout=timeout))
    return PrefixStore(f"dtrain/{agree_on_attempt(shared, world, timeout)}", shared)


def agree_on_attempt(store: Store, world: World, timeout: timedelta) -> str:
    """Return a name that all ranks of this attempt get, and none of an earlier one.

    Rank 0 gives it to each rank that asks. Collective: every rank calls it.

    Raises:
        dist.DistStoreError: not all ranks have come in time.
    """
    own = uuid.uuid4().hex
    if world.rank:
        store.set(f"dtrain/asks/{world.rank}", own)
        store.wait([f"dtrain/told/{own}"], timeout)
        name: str = store.get(f"dtrain/told/{own}").decode()
        store.set(f"dtrain/has/{name}/{world.rank}", "")
        return name
    absent, answered = set(range(1, world.size)), set()
    end = time.monotonic() + timeout.total_seconds()
    while absent:
        for rank in sorted(absent):
            asks = f"dtrain/asks/{rank}"
            if store.check([asks]) and (asker := store.get(asks).decode()) not in answered:
                store.set(f"dtrain/told/{asker}", own)  # nobody reads an answer to a dead rank
                answered.add(asker)
            if store.check([f"dtrain/has/{own}/{rank}"]):
                absent.discard(rank)
        if time.monotonic() > end:
            raise dist.DistStoreError(
                f"rank {', '.join(map(str, sorted(absent)))} did not come in {timeout}"
            )
        time.sleep(0.01)
    return own


def address_of_first() -> str:
    """Return rank 0's address: the loopback, or one in the network in which the ranks have met.

    A machine's own name may lead to its loopback on itself, and to its address elsewhere.
    Collective: every rank calls it.
    """
    host = os.environ.get("MASTER_ADDR")
    own = "127.0.0.1"
    if host and MEETING not in os.environ:
        own = str(socket.getaddrinfo(host, None)[0][4][0])
    addresses = all_gather_object(own)
    return next((each for each in addresses if not ip_address(each).is_loopback), addresses[0])


def elastic_agents() -> frozenset[str]:
    """Return the names of the agents of torchrun that have started the ranks; empty: none has.

    Collective: every rank calls it.
    """
    own, agent = "", os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ and MEETING not in os.environ:
        # With its time of start on Linux, for process numbers are used again.
        stat = Path(f"/proc/{agent}/stat")
        digest = hashlib.sha256(os.environ["TORCHELASTIC_RUN_ID"].encode()).hexdigest()
        start = stat.read_text().rsplit(")", 1)[1].split()[19] if stat.exists() else digest
        own = f"{socket.gethostname()}:{agent}:{start}"
    return frozenset(filter(None, all_gather_object(own)))
