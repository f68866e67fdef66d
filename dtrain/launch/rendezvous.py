"""How the ranks of a job find each other.

torchrun keeps one store for all its attempts at a job, and ranks that it has restarted would read
in it where the dead ones had listened. So the ranks of an attempt agree on a name first, and write
below it.
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

from dtrain.launch.collectives import all_gather_object
from dtrain.launch.flight_recorder import collective_failed
from dtrain.launch.rank_processes import MEETING
from dtrain.launch.world import World, cores

TIMEOUTS = ("default_pg_timeout", "default_pg_nccl_timeout")
NOTES = 4096  # collectives that torch's flight recorder remembers, for whoever asks why ranks wait


@contextmanager
def process_group(
    world: World, device: torch.device, *, threads: int | None, timeout_s: float
) -> Iterator[None]:
    """Set this process's threads and device, and be in the process group while the context lasts.

    Afterwards the environment is as it was: Accelerate and DeepSpeed leave RANK and WORLD_SIZE in
    it, and the next run of a sweep would take itself for a rank of theirs.

    Raises:
        ValueError: the port of the rendezvous is taken.
    """
    before = torch.get_num_threads()
    defaults = {name: getattr(dist.distributed_c10d, name) for name in TIMEOUTS}
    environment = dict(os.environ)
    torch.set_num_threads(threads or max(1, cores() // world.local_size))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.init()
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(NOTES))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    try:
        for name in TIMEOUTS:  # of groups that are made later
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
        torch.set_num_threads(before)
        for name, value in defaults.items():
            setattr(dist.distributed_c10d, name, value)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


def _store(world: World, timeout: timedelta) -> dist.Store:
    """A store that the ranks of this attempt share, and no others."""
    if world.size == 1:
        return dist.HashStore()  # nobody to find: no port
    if file := os.environ.get(MEETING):
        return dist.FileStore(file, world.size)
    shared, *_ = next(dist.rendezvous("env://", timeout=timeout))
    return dist.PrefixStore(f"dtrain/{agree_on_attempt(shared, world, timeout)}", shared)


def agree_on_attempt(store: dist.Store, world: World, timeout: timedelta) -> str:
    """A name that all ranks of this attempt get, and none of an earlier one: rank 0 gives it to who
    asks.

    Raises:
        dist.DistStoreError: not all have come.
    """
    own = uuid.uuid4().hex
    if world.rank:
        store.set(f"dtrain/asks/{world.rank}", own)
        store.wait([f"dtrain/told/{own}"], timeout)
        name = store.get(f"dtrain/told/{own}").decode()
        store.set(f"dtrain/has/{name}/{world.rank}", "")
        return name
    absent, told, end = set(range(1, world.size)), set(), time.monotonic() + timeout.total_seconds()
    while absent:
        for rank in sorted(absent):
            if (
                store.check([asks := f"dtrain/asks/{rank}"])
                and (name := store.get(asks).decode()) not in told
            ):
                store.set(f"dtrain/told/{name}", own)  # or a dead one's, which nobody reads
                told.add(name)
            if store.check([f"dtrain/has/{own}/{rank}"]):
                absent.discard(rank)
        if time.monotonic() > end:
            raise dist.DistStoreError(
                f"rank {', '.join(map(str, sorted(absent)))} did not come in {timeout}"
            )
        time.sleep(0.01)
    return own


def address_of_first() -> str:
    """Where rank 0 is reached: on this machine alone, or in the network in which the ranks have
    met. A collective.

    A machine's own name may lead it to its loopback, and others not.
    """
    host = os.environ.get("MASTER_ADDR")
    apart = host and MEETING not in os.environ
    every = all_gather_object(
        str(socket.getaddrinfo(host, None)[0][4][0]) if apart else "127.0.0.1"
    )
    return next((each for each in every if not ip_address(each).is_loopback), every[0])


def elastic_agents() -> frozenset[str]:
    """The elastic agents of all ranks, if torchrun has started them. A collective."""
    own, agent = "", os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ and MEETING not in os.environ:
        # on Linux its time of start: numbers of processes come again
        stat = Path(f"/proc/{agent}/stat")
        digest = hashlib.sha256(os.environ["TORCHELASTIC_RUN_ID"].encode()).hexdigest()
        begun = stat.read_text().rsplit(")", 1)[1].split()[19] if stat.exists() else digest
        own = f"{socket.gethostname()}:{agent}:{begun}"
    return frozenset(filter(None, all_gather_object(own)))
