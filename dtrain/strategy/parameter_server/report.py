"""What a run under a parameter server reports in place of a profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dtrain.launch.collectives import all_gather_object
from dtrain.strategy.parameter_server.server import Server
from dtrain.strategy.parameter_server.session import WorkerSession


def report(
    server: Server, sessions: Sequence[WorkerSession], steps: int, updates: int, seconds: float
) -> dict[str, Any]:
    """Return the messages of all ranks, and the first server's counts. A collective.

    Args:
        sessions: of this server; none on a rank that is no server.
        steps, updates, seconds: of this run, without earlier ones.
    """
    strategy = server.strategy
    counts = {
        "mode": strategy.mode,
        "servers": strategy.servers,
        "updates": updates,
        "updates_per_second": updates / (seconds or 1.0),
        "most_ahead": server.queue.max_lead,
        "staleness": dict(sorted(server.staleness.items())),
        "lives": dict(server.lives),
        "workers": {
            session.worker: {
                "gradients": session.gradients,
                "compute_seconds": session.compute_seconds,
                "wait_seconds": session.wait_seconds,
            }
            for session in sessions
            if session.gradients
        },
    }
    gathered = all_gather_object((counts, [session.traffic for session in sessions], steps))
    servers = [(counts, traffic) for counts, traffic, _ in gathered[: strategy.servers]]
    steps = max(1, gathered[0][2])
    messages = [_message(traffic, "sent", steps) for _, traffic in servers]
    for worker in range(strategy.workers):
        messages.append(_message([traffic[worker] for _, traffic in servers], "received", steps))
    return {
        "ranks": [
            {"traffic": [message], "traffic_predicted": None, "memory": None, "time": None}
            for message in messages
        ],
        "bubble": None,
        "asynchronous": servers[0][0],
    }


def _message(traffic: Sequence[Mapping[str, int]], way: str, steps: int) -> dict[str, Any]:
    """Return what a rank sends in a step, by counts of its connections at the servers' ends."""
    size, calls = (
        sum(counts.get(key, 0) for counts in traffic) for key in (way, f"{way}_messages")
    )
    return {
        "axis": "dp",
        "operation": "send",
        "calls": calls / steps,
        "bytes": size // steps,
        "wire_bytes": size / steps,
    }
