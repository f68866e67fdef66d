"""torchrun on two hosts, and the cable between them pulled out for a while.

Network namespaces: needs root.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hosts import DEVICE, Hosts
from runs import TORCHRUN, alive, curve, printed, ranks, start, training, until

from dtrain.run.checkpoint_files import published, verify

STEPS = 80


def both(hosts: Hosts, folder: Path, *settings: str) -> list:
    """A run with one rank on each."""
    command = training(
        "strategy=fsdp", f"steps={STEPS}", "checkpoint.every=5", "hydra.run.dir=run", *settings
    )
    return [
        start(
            folder,
            *TORCHRUN,
            *hosts.node(host),
            *command,
            before=hosts.on(host),
            GLOO_SOCKET_IFNAME=DEVICE,
        )
        for host in (0, 1)
    ]


@pytest.mark.deep
def test_a_cable_pulled_out(hosts: Hosts, tmp_path: Path) -> None:
    """For a moment: training goes on.

    For longer than the timeout: both ends say so and end, and resume.
    """
    cut = tmp_path / "cut"
    processes = both(hosts, cut, "launch.timeout_s=8")
    until(lambda: max(curve(cut / "run"), default=0) >= 12, said=lambda: printed(cut))
    hosts.cable(plugged=False)
    time.sleep(2)
    hosts.cable(plugged=True)
    now = max(curve(cut / "run"))
    until(lambda: max(curve(cut / "run")) > now + 2, 90, lambda: printed(cut))
    pids = ranks(cut / "run")
    try:
        hosts.cable(plugged=False)
        until(lambda: not any(alive(pid) for pid in pids.values()), 120, lambda: printed(cut))
    finally:
        hosts.cable(plugged=True)
    assert [process.wait(400) for process in processes] == [1, 1], printed(cut)
    assert "rank 1 does not answer: its process is gone or stopped" in printed(cut)
    assert "dtrain: rank 1: a collective failed: " in printed(
        cut
    ) and "dtrain/train.py" not in printed(cut)
    newest = published(cut / "run" / "checkpoints")[-1]
    assert verify(newest) == ""
    assert [process.wait(400) for process in both(hosts, cut, "resume=auto")] == [0, 0], printed(
        cut
    )

    reference = tmp_path / "whole"
    assert [process.wait(400) for process in both(hosts, reference)] == [0, 0], printed(reference)
    assert curve(cut / "run") == curve(reference / "run") and len(curve(reference / "run")) == STEPS
