"""launch/node.sh as two nodes, or pods, of a run: one is told to end, all stop together, and
all go on together.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import warm
from runs import ENVIRONMENT, ROOT, TINY, curve, free_port, until
from test_listening import beyond, descendants, listening

RESUMABLE = 75
STEPS = 300
Node = subprocess.Popen


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., list[Node]]]:
    """Start the first so many of a run's two nodes."""
    started: list[Node] = []
    port = free_port()

    def of(count: int = 2) -> list[Node]:
        nodes = []
        for number in range(count):
            rendezvous = [
                f"--rdzv-endpoint=localhost:{port}",
                f"--rdzv-conf=is_host={int(number == 0)}",
            ]
            command = [
                "launch/node.sh",
                tmp_path,
                "--nnodes=2",
                "--nproc-per-node=1",
                "--rdzv-backend=c10d",
                *rendezvous,
                "--local-addr=localhost",
                "scripts/train.py",
                *TINY,
                f"steps={STEPS}",
            ]
            # the network of these machines
            environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo"}
            nodes.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
            )
            started.append(nodes[-1])
        return nodes

    yield of
    for node in started:
        if node.poll() is None:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()


def test_nodes_meet_by_a_name_that_is_drawn_and_their_users_alone(tmp_path: Path) -> None:
    """The same on all nodes of a run and when it goes on, another for another run; in no
    command line.
    """
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$PET_RDZV_ID $*"\n')
    python.chmod(0o755)
    environment = ENVIRONMENT | {"PATH": f"{tmp_path}:{ENVIRONMENT['PATH']}"}

    def start(run: str) -> Node:
        command = [ROOT / "launch/node.sh", tmp_path / run, "--nnodes=4", "train.py"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    nodes = [start(run) for run in ["one"] * 4 + ["another"]]
    said = [node.communicate(timeout=60)[0] for node in nodes] + [
        start("one").communicate(timeout=60)[0]
    ]
    names = [line.split()[0] for line in said]
    assert (
        len(set(names)) == 2
        and len({*names[:4], names[5]}) == 1
        and all(len(bytes.fromhex(n)) == 16 for n in names)
    )
    assert not any(line.count(name) > 1 for name, line in zip(names, said, strict=True))
    for run in ("one", "another"):
        (kept,) = (tmp_path / run).iterdir()
        assert kept.name == ".meeting" and stat.S_IMODE(kept.stat().st_mode) == 0o600


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "another's"])
def test_a_name_that_somebody_else_has_left_is_not_taken(kind: str, tmp_path: Path) -> None:
    """Whoever gave the folder away would know it."""
    place = tmp_path / "run" / ".meeting"
    place.parent.mkdir()
    (tmp_path / "theirs").write_text("known")
    {
        "link": lambda: place.symlink_to(tmp_path / "theirs"),
        "pipe": lambda: os.mkfifo(place),
        "folder": place.mkdir,
        "another's": lambda: place.write_text("known"),
    }[kind]()
    if kind == "another's":
        if os.geteuid():
            pytest.skip("needs root, to give a file away")
        os.chown(place, 12345, -1)
    (tmp_path / "python").write_text('#!/bin/sh\necho "began with $PET_RDZV_ID"\n')
    (tmp_path / "python").chmod(0o755)
    environment = ENVIRONMENT | {"PATH": f"{tmp_path}:{ENVIRONMENT['PATH']}"}
    command = [ROOT / "launch/node.sh", tmp_path / "run", "train.py"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    said = f"launch/node.sh: {place} is not a file of yours: remove it, or use another folder\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", said)
    assert [path.name for path in place.parent.iterdir()] == [".meeting"] and not (
        kind == "folder" and any(place.iterdir())
    )


@pytest.mark.parametrize(("given", "kept"), [
    ([], ["resume=auto"]), (["resume=latest"], ["resume=latest"]),
    (["overwrite=true", "steps=3"], ["overwrite=true", "steps=3"]),
    (["model.resume=x"], ["model.resume=x", "resume=auto"]),
], ids=str)  # fmt: skip
def test_a_run_goes_on_unless_it_is_told_otherwise(
    given: list[str], kept: list[str], tmp_path: Path
) -> None:
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = ENVIRONMENT | {"PATH": f"{tmp_path}:{ENVIRONMENT['PATH']}"}
    command = [ROOT / "launch/node.sh", tmp_path / "run", "train.py", *given]
    said = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, timeout=60
    ).stdout.split()
    assert said == [
        "-m",
        "dtrain.launch.agent",
        "--signals-to-handle=SIGINT",
        "train.py",
        *kept,
        f"hydra.run.dir={tmp_path}/run",
    ]


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["steps=none"], 2, "steps"),
        (["steps=1", "+x=1"], 2, "unknown key 'x'"),
        (["steps=1"], 0, ""),
    ],
)
def test_a_node_ends_as_the_rank_that_failed(
    words: list[str], status: int, said: str, tmp_path: Path
) -> None:
    """And says no more than that."""
    command = [
        ROOT / "launch/node.sh",
        tmp_path / "run",
        "--nnodes=1",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
        "scripts/train.py",
        *TINY,
        *words,
    ]
    ended = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == status, ended.stderr
    assert said in ended.stderr and len(ended.stderr.splitlines()) <= (status > 0), ended.stderr


@pytest.mark.deep
@pytest.mark.parametrize("told", [0, 1])
def test_one_node_that_is_told_stops_all_and_all_go_on(start, told: int, tmp_path: Path) -> None:
    nodes = start()
    until(lambda: len(curve(tmp_path)) >= 20)
    found = {
        pid: addresses
        for node in nodes
        for pid, addresses in listening(descendants(node.pid)).items()
    }
    agents = {pid for pid in found if "dtrain.launch.agent" in warm.command_of(pid)}
    # ranks on the network that was named
    assert len(agents) == 2 and set(beyond(found)) <= agents, found
    nodes[told].send_signal(signal.SIGTERM)
    assert [node.wait(60) for node in nodes] == [RESUMABLE, RESUMABLE]
    assert len(curve(tmp_path)) < STEPS and (tmp_path / "resumable").exists()
    assert [node.wait(120) for node in start()] == [0, 0]
    assert len(curve(tmp_path)) == STEPS and not (tmp_path / "resumable").exists()


@pytest.mark.deep
def test_a_node_that_waits_for_another_ends_when_told(start) -> None:
    (node,) = start(1)
    time.sleep(5)
    node.send_signal(signal.SIGTERM)
    assert node.wait(30) == 128 + signal.SIGKILL
