"""Who listens, and where, while each kind of run goes on: nobody beyond this machine, but where
machines must meet.
"""

from __future__ import annotations

import ipaddress
import os
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import warm
from runs import ROOT, TORCHRUN

from dtrain.launch import rendezvous
from dtrain.launch.rank_processes import MEETING

TRAIN, COMPARE = (
    [sys.executable, str(ROOT / f"scripts/{name}.py")] for name in ("train", "compare")
)
LONG = ["model=tiny", "steps=100000", "global_batch_size=4", "eval.every=0", "launch.threads=1"]
LISTENS = "0A"  # a state in /proc/net/tcp


def descendants(pid: int) -> list[int]:
    parents = {}
    for each in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        with suppress(OSError):
            parents[each] = int(Path(f"/proc/{each}/stat").read_text().rsplit(")", 1)[1].split()[1])
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


def listening(pids: list[int]) -> dict[int, set[str]]:
    """The addresses at which each of these processes listens."""
    at: dict[str, str] = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENS:
                raw = bytes.fromhex(fields[1].split(":")[0])
                words = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
                address = ipaddress.ip_address(words)
                at[f"socket:[{fields[9]}]"] = str(getattr(address, "ipv4_mapped", None) or address)
    found = {}
    for pid in pids:
        with suppress(OSError):
            found[pid] = {at[link] for link in warm.opened_by(pid) if link in at}
    return found


def beyond(found: dict[int, set[str]]) -> dict[int, set[str]]:
    """Those that others than this machine can reach."""
    reached = {
        pid: {a for a in addresses if not ipaddress.ip_address(a).is_loopback}
        for pid, addresses in found.items()
    }
    return {pid: addresses for pid, addresses in reached.items() if addresses}


@contextmanager
def going_on(
    command: list[str], folder: Path, cache: Path, figures: str, **environment: str
) -> Iterator[int]:
    """A run that has done some steps."""
    process = warm.popen(
        command, cwd=folder, env=os.environ | {"DTRAIN_CACHE": str(cache)} | environment
    )
    end = time.monotonic() + 120
    while not any(file.stat().st_size for file in folder.glob(figures)):
        assert process.poll() is None and time.monotonic() < end, process.communicate(10)
        time.sleep(0.05)
    yield process.pid
    process.kill()


@pytest.mark.parametrize(("command", "figures"), [
    ([*TRAIN, *LONG, "strategy=ddp", "launch.nproc=2", "hydra.run.dir=run"], "run/metrics.jsonl"),
    ([*COMPARE, *LONG, "strategies=[fsdp]", "baseline=fsdp", "launch.nproc=2", "hydra.run.dir=run"],
     "run/runs/*/0/metrics.jsonl"),
    ([*TRAIN, *LONG, "strategy=parameter_server", "launch.nproc=3", "hydra.run.dir=run"],
     "run/metrics.jsonl"),
], ids=["own ranks", "compare", "parameter server"])  # fmt: skip
def test_ranks_of_one_machine_listen_to_it_alone(
    command: list[str], figures: str, tmp_path: Path, cache: Path
) -> None:
    with going_on(command, tmp_path, cache, figures) as pid:
        found = listening(descendants(pid))
        assert sum(map(bool, found.values())) >= 2 and not beyond(found), found
        assert not found[pid]  # the launcher has no port at all


def test_under_torchrun_nobody_listens_beyond_this_machine_but_torchrun(
    tmp_path: Path, cache: Path
) -> None:
    """Which we cannot change: docs/clusters.md says so.

    Its ranks listen where the parameter server's own store is too.
    """
    command = [
        *TORCHRUN,
        "--standalone",
        "--local-addr",
        "127.0.0.1",
        "--nproc-per-node",
        "3",
        TRAIN[1],
        *LONG,
        "strategy=parameter_server",
        "hydra.run.dir=run",
    ]
    with going_on(command, tmp_path, cache, "run/metrics.jsonl", GLOO_SOCKET_IFNAME="lo") as pid:
        found = listening(descendants(pid))
    assert sum(map(bool, found.values())) >= 4 and set(beyond(found)) <= {pid}, (pid, found)


def test_the_file_in_which_ranks_meet_is_its_users_alone(tmp_path: Path, cache: Path) -> None:
    command = [*TRAIN, *LONG, "strategy=ddp", "launch.nproc=2", "hydra.run.dir=run"]
    with going_on(command, tmp_path, cache, "run/metrics.jsonl"):
        # others' too, of other tests
        made = list(Path(tempfile.gettempdir()).glob("dtrain-*/meeting"))
        assert made and {stat.S_IMODE(file.parent.stat().st_mode) for file in made} == {0o700}


def test_where_rank_0_is_reached_is_what_another_machine_says_of_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To which the machine itself may give its loopback."""
    monkeypatch.delenv(MEETING, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for seen, expected in (
        (["127.0.1.1", "10.0.0.7"], "10.0.0.7"),
        (["10.0.0.7"] * 2, "10.0.0.7"),
        (["127.0.1.1"] * 2, "127.0.1.1"),
        (["::1", "fd00::7"], "fd00::7"),
    ):
        monkeypatch.setattr(rendezvous, "all_gather_object", lambda own, seen=seen: seen)
        assert rendezvous.address_of_first() == expected
    monkeypatch.setattr(rendezvous, "all_gather_object", lambda own: [own, own])
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert ipaddress.ip_address(rendezvous.address_of_first()).is_loopback
    monkeypatch.setenv(MEETING, "/a/file")
    monkeypatch.setenv("MASTER_ADDR", "no.such.host")  # of a shell in which something else ran
    assert rendezvous.address_of_first() == "127.0.0.1"
