"""launch/node.sh as two nodes, or pods, of a run: one is told to end, all stop together, and all go on together."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from runs import ENVIRONMENT, ROOT, TINY, curve, free_port, until

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
                "--rdzv-id=run",
            ]
            command = ["launch/node.sh", tmp_path, "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", *rendezvous,
                       "--local-addr=localhost", "scripts/train.py", *TINY, f"steps={STEPS}"]  # fmt: skip
            nodes.append(subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, start_new_session=True))
            started.append(nodes[-1])
        return nodes

    yield of
    for node in started:
        if node.poll() is None:
            os.killpg(node.pid, signal.SIGKILL)


@pytest.mark.deep
@pytest.mark.parametrize("told", [0, 1])
def test_one_node_that_is_told_stops_all_and_all_go_on(start, told: int, tmp_path: Path) -> None:
    nodes = start()
    until(lambda: len(curve(tmp_path)) >= 20)
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
