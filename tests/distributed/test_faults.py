"""Ranks that are killed, stopped, told to end, or that differ: real processes under torchrun."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import warm
from hypothesis import given
from hypothesis import strategies as st
from runs import (
    ROOT,
    TORCHRUN,
    alive,
    curve,
    free_port,
    printed,
    ranks,
    start,
    training,
    two_nodes,
    until,
)
from torch.distributed.device_mesh import init_device_mesh

from dtrain.launch.preemption import Preemption
from dtrain.launch.rendezvous import agree_on_attempt, process_group
from dtrain.launch.world import World

STANDALONE = [*TORCHRUN, "--standalone", "--nproc-per-node", "2"]
SETTINGS = ["strategy=fsdp", "steps=60", "checkpoint.every=10", "launch.timeout_s=60"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[float, float]]:
    """The curve of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder, *STANDALONE, *training(*SETTINGS, "hydra.run.dir=run"))
    assert process.wait(120) == 0, printed(folder)
    return curve(folder / "run")


def test_ranks_of_an_attempt_meet_each_other_and_no_dead_ones() -> None:
    """Three attempts over one store, in the first of which a rank has asked and died."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    store.set("dtrain/asks/1", "dead")
    names = []
    for _ in range(3):
        told: dict[int, str] = {}

        def come(rank: int, told: dict[int, str] = told) -> None:
            own = dist.TCPStore("127.0.0.1", store.port, is_master=False)
            told[rank] = agree_on_attempt(own, World(rank, 3), timedelta(seconds=20))

        threads = [threading.Thread(target=come, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(told) == 3 and len(set(told.values())) == 1
        names.append(told[0])
    assert len(set(names)) == 3
    with pytest.raises(dist.DistStoreError, match="rank 1, 2 did not come"):
        agree_on_attempt(store, World(0, 3), timedelta(seconds=0.2))


def test_every_group_has_the_timeout_that_is_asked_for() -> None:
    with process_group(World(), torch.device("cpu"), threads=None, timeout_s=7):
        groups = [
            dist.group.WORLD,
            dist.new_group([0]),
            init_device_mesh("cpu", (1,), mesh_dim_names=("dp",)).get_group(),
        ]
        assert {g._get_backend(torch.device("cpu")).options._timeout for g in groups} == {
            timedelta(seconds=7)
        }  # type: ignore[union-attr]
    assert dist.distributed_c10d.default_pg_timeout > timedelta(seconds=7)


@given(
    turns=st.lists(st.integers(0, 2), min_size=1, max_size=60),
    at=st.integers(0, 40),
    whom=st.integers(0, 2),
    further=st.integers(1, 2),
)
def test_all_ranks_stop_after_the_same_step(
    turns: list[int], at: int, whom: int, further: int
) -> None:
    """Three ranks look after each of their steps, in a drawn order; none is more than `further`
    steps ahead.
    """
    store = dist.HashStore()
    with mock.patch.object(dist.distributed_c10d, "_get_default_store", lambda: store):
        each = [Preemption(further) for _ in range(3)]
    done, stopped = [0, 0, 0], {}
    for moment, rank in enumerate([*turns, *[0, 1, 2] * 40]):
        if moment == at:
            each[whom]._ask(signal.SIGTERM, None)
        # the others have begun its next step, or ended
        if rank not in stopped and done[rank] - min(done) < further:
            done[rank] += 1
            if each[rank].stops_after(done[rank]):
                stopped[rank] = done[rank]
    assert len(stopped) == 3 and len(set(stopped.values())) == 1
    assert all(one.stopped_before(1000) for one in each)


def test_killed_ranks_come_back_and_the_curve_is_the_same(
    tmp_path: Path, whole: dict[int, tuple[float, float]]
) -> None:
    """kill -9 of each rank; bit for bit, in the folder of the first attempt, with no setting
    for it.
    """
    process = start(
        tmp_path,
        *TORCHRUN,
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "2",
        *training(*SETTINGS),
    )
    for rank, step in ((1, 12), (0, 34)):
        until(
            lambda: any(max(curve(run), default=0) >= step for run in tmp_path.glob("outputs/*/*")),  # noqa: B023
            said=lambda: printed(tmp_path),
        )
        os.kill(ranks(next(tmp_path.glob("outputs/*/*")))[rank], signal.SIGKILL)
    assert process.wait(120) == 0, printed(tmp_path)
    (run,) = tmp_path.glob("outputs/*/*")  # the folders of later attempts are gone
    assert curve(run) == whole
    assert "resumed from" in printed(tmp_path)
    assert json.loads((run / "summary.json").read_text())["steps"] == 60


@pytest.mark.deep
def test_a_lost_node_leaves_the_rest_to_another_number_of_ranks(
    tmp_path: Path, whole: dict[int, tuple[float, float]]
) -> None:
    """torchrun --nnodes 1:2: one of the two is killed, agent and rank; the other goes on alone."""
    port, conf = free_port(), "last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3"
    command = [
        *TORCHRUN,
        *two_nodes(f"localhost:{port}", conf, "1:2"),
        "--max-restarts",
        "2",
        *training(*SETTINGS, "strategy=ddp", "hydra.run.dir=run"),
    ]
    first = start(tmp_path, *command)
    second = start(tmp_path, *command)
    until(lambda: max(curve(tmp_path / "run"), default=0) >= 15, said=lambda: printed(tmp_path))
    gone = ranks(tmp_path / "run")
    assert len(gone) == 2
    victim, other = (second, first) if listens(first, port) else (first, second)
    os.kill(victim.pid, signal.SIGKILL)
    assert other.wait(150) == 0, printed(tmp_path)
    assert victim.wait(10) == -signal.SIGKILL
    found = curve(tmp_path / "run")
    assert list(found) == list(range(1, 61))
    for step, told in whole.items():
        assert found[step] == pytest.approx(told, rel=1e-9)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 1
    until(lambda: not any(alive(pid) for pid in gone.values()), 20)


def listens(agent: subprocess.Popen[str], port: int) -> bool:
    listening = {
        line.split()[9]
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        if line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A"
    }
    return any(f"socket:[{inode}]" in warm.opened_by(agent.pid) for inode in listening)


@pytest.mark.parametrize("whom", [pytest.param("a rank", marks=pytest.mark.deep), "the launcher"])
def test_a_run_that_is_told_to_end_is_resumable(
    whom: str, tmp_path: Path, whole: dict[int, tuple[float, float]]
) -> None:
    settings = [*SETTINGS, "checkpoint.every=0", "hydra.run.dir=run", "resume=auto"]
    if whom == "a rank":
        process = start(tmp_path, *STANDALONE, *training(*settings))
    else:
        process = start(tmp_path, sys.executable, *training(*settings, "launch.nproc=2"))
    until(lambda: max(curve(tmp_path / "run"), default=0) >= 13, said=lambda: printed(tmp_path))
    os.kill(ranks(tmp_path / "run")[1] if whom == "a rank" else process.pid, signal.SIGTERM)
    assert process.wait(60) == 0, printed(tmp_path)
    said = (tmp_path / "run" / "resumable").read_text()
    step = int(
        re.match(r"stopped after step (\d+) of 60, as it was told; resumable: resume=", said)[1]
    )  # type: ignore[index]
    assert said.strip() in printed(tmp_path) and "Traceback" not in printed(tmp_path)
    assert (
        max(curve(tmp_path / "run")) == step < 60
        and not (tmp_path / "run" / "summary.json").exists()
    )
    assert start(tmp_path, *STANDALONE, *training(*settings)).wait(120) == 0, printed(tmp_path)
    assert curve(tmp_path / "run") == whole and not (tmp_path / "run" / "resumable").exists()


@pytest.mark.deep
def test_a_parameter_server_that_is_told_to_end_is_resumable(tmp_path: Path) -> None:
    settings = [
        "strategy=parameter_server",
        "steps=400",
        "launch.nproc=3",
        "hydra.run.dir=run",
        "resume=auto",
    ]
    process = start(tmp_path, sys.executable, *training(*settings))
    until(lambda: max(curve(tmp_path / "run"), default=0) >= 5, said=lambda: printed(tmp_path))
    process.terminate()
    assert process.wait(60) == 0, printed(tmp_path)
    step = max(curve(tmp_path / "run"))
    assert f"stopped after step {step} of 400" in (tmp_path / "run" / "resumable").read_text()
    assert (
        start(tmp_path, sys.executable, *training(*settings, f"steps={step + 5}")).wait(90) == 0
    ), printed(tmp_path)
    assert list(curve(tmp_path / "run")) == list(range(1, step + 6))


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("pipeline", marks=pytest.mark.deep)])
def test_a_stopped_rank_is_named(strategy: str, tmp_path: Path) -> None:
    """SIGSTOP: within the timeout, with rank, axis, collective and step; the launcher then ends
    all.
    """
    process = start(
        tmp_path,
        sys.executable,
        *training(
            f"strategy={strategy}",
            "steps=5000",
            "launch.timeout_s=8",
            "launch.nproc=2",
            "hydra.run.dir=run",
        ),
    )
    until(lambda: max(curve(tmp_path / "run"), default=0) >= 3, said=lambda: printed(tmp_path))
    pids = ranks(tmp_path / "run")
    os.kill(pids[1], signal.SIGSTOP)
    where = (
        r"step \d+, axis fsdp, collective \d+, \w+ of .*: rank 0 waits in it"
        if strategy == "fsdp"
        else r"rank 0 in step \d+"
    )
    told = (
        f"dtrain: ranks wait for each other: {where}; rank 1 does not answer: its process is gone "
        f"or stopped"
    )
    until(lambda: re.search(told, printed(tmp_path)), said=lambda: printed(tmp_path))
    assert "a collective failed" not in re.split(told, printed(tmp_path))[0]
    assert process.wait(90) == 1 and "Traceback" not in printed(tmp_path), printed(tmp_path)
    assert not any(alive(pid) for pid in pids.values())


@pytest.mark.parametrize(("what", "said"), [
    ("setting",
     r"rank 1 on \S+ is to run something else than rank 0 on \S+: optimizer.lr is 0.\d+ there, 0.\d+ here$"),
    pytest.param("code",
                 r"rank 1 on \S+ is to run something else than rank 0 on \S+: the code of dtrain/parallel/clip.py is \w+ there, \w+ here$", marks=pytest.mark.deep),
], ids=["setting", "code"])  # fmt: skip
def test_ranks_that_differ_are_refused(what: str, said: str, tmp_path: Path) -> None:
    """One node has another setting, or another version of a file."""
    settings = training("strategy=ddp", "steps=5", "hydra.run.dir=run")
    command = [*TORCHRUN, *two_nodes(f"localhost:{free_port()}"), *settings]
    other: list[str] = []
    environment: dict[str, str] = {}
    if what == "setting":
        other = ["optimizer.lr=0.25"]
    else:
        for name in ("dtrain", "configs", "hydra_plugins"):
            shutil.copytree(
                ROOT / name, tmp_path / "copy" / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        with (tmp_path / "copy" / "dtrain" / "parallel" / "clip.py").open("a") as file:
            file.write("# newer\n")
        environment = {"PYTHONPATH": str(tmp_path / "copy")}
    cold = what == "code"  # a warm process has ours already
    both = [start(tmp_path, *command), start(tmp_path, *command, *other, cold=cold, **environment)]
    assert [process.wait(90) for process in both] == [1, 1], printed(tmp_path)
    lines = [line for line in printed(tmp_path).splitlines() if line.startswith("dtrain: ")]
    assert lines and all(re.search(said, line) for line in lines), printed(tmp_path)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_ranks_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    process = start(
        tmp_path, *STANDALONE, *training("strategy=ddp", "steps=5000", "hydra.run.dir=run")
    )
    until(lambda: curve(tmp_path / "run"), said=lambda: printed(tmp_path))
    pids = ranks(tmp_path / "run")
    process.kill()
    process.wait()
    until(lambda: not any(alive(pid) for pid in pids.values()), 10)
    assert len(pids) == 2


@pytest.mark.parametrize("resume", ["auto", pytest.param("latest", marks=pytest.mark.deep)])
def test_resume_auto_begins_where_there_is_nothing_and_latest_does_not(
    resume: str, tmp_path: Path
) -> None:
    process = start(
        tmp_path, sys.executable, *training("steps=2", "hydra.run.dir=run", f"resume={resume}")
    )
    assert process.wait(60) == (0 if resume == "auto" else 2), printed(tmp_path)
    assert len(curve(tmp_path / "run")) == (2 if resume == "auto" else 0)


@pytest.mark.deep
def test_resume_auto_leaves_alone_what_is_finished(tmp_path: Path) -> None:
    asked = training("steps=4", "checkpoint.every=2", "hydra.run.dir=run", "resume=auto")
    assert start(tmp_path, sys.executable, *asked).wait(60) == 0, printed(tmp_path)
    found, summary = curve(tmp_path / "run"), (tmp_path / "run" / "summary.json").read_text()
    assert start(tmp_path, sys.executable, *asked).wait(60) == 0, printed(tmp_path)
    assert "step-00000004 has done all 4 steps: nothing is left to do" in printed(tmp_path)
    assert (tmp_path / "run" / "summary.json").read_text() == summary
    (tmp_path / "run" / "summary.json").unlink()  # killed after its last checkpoint
    assert start(tmp_path, sys.executable, *asked).wait(60) == 0, printed(tmp_path)
    assert "step-00000002, step 2" in printed(tmp_path) and curve(tmp_path / "run") == found
