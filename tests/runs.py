"""Runs under torchrun for tests that break them: how they are started, watched, and compared."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import warm

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TINY = ["model=tiny", "global_batch_size=4", "eval.every=0", "launch.threads=1", "strategy=ddp"]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}


# of this process, below those that systems hand out
PORTS = count(15_000 + os.getpid() % 1_500 * 10)


def free_port() -> int:
    """A port that nobody has, and that nobody is given before it is used."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port := next(PORTS)))
            return port


def two_nodes(endpoint: str, conf: str = "", nodes: str = "2") -> list[str]:
    """torchrun's words for a node with one rank, one of two."""
    words = [
        "--nnodes",
        nodes,
        "--nproc-per-node",
        "1",
        "--rdzv-backend",
        "c10d",
        "--rdzv-id",
        "x",
        "--rdzv-endpoint",
        endpoint,
    ]
    return [*words, "--rdzv-conf", conf] if conf else words


def training(*settings: str) -> list[str]:
    """The script, with a model that takes seconds; in fp64, so that curves can be compared
    closely.
    """
    return [
        str(ROOT / "scripts/train.py"),
        "model=tiny",
        "dtype=fp64",
        "eval.every=0",
        "launch.threads=1",
        *settings,
    ]


def start(
    folder: Path,
    *command: str,
    before: tuple[str, ...] = (),
    cold: bool = False,
    **environment: str,
) -> Any:
    """A command in a folder and a session of its own, its output in files there.

    Args:
        before: words that come first, so that an interpreter has to be started.
        cold: start one anyway.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"printed-{time.monotonic_ns()}").open("w") as printed:
        if not (before or cold):
            return warm.popen(
                command, cwd=folder, env=os.environ | environment, stdout=printed, stderr=printed
            )
        process = subprocess.Popen(
            [*before, *command],
            cwd=folder,
            env=os.environ | environment,
            text=True,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        warm.STARTED.append(process)
        return process


def printed(folder: Path) -> str:
    """All that commands there have printed, in their order."""
    return "".join(file.read_text() for file in sorted(folder.glob("printed-*")))


def curve(run: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step."""
    file = run / "metrics.jsonl"
    lines = (
        [line for line in file.read_text().splitlines() if line.endswith("}")]
        if file.exists()
        else []
    )
    return {told["step"]: (told["loss"], told["grad_norm"]) for told in map(json.loads, lines)}


def ranks(run: Path) -> dict[int, int]:
    """The newest process of each rank, as its log tells."""
    logs = {
        int(log.stem.removeprefix("rank")): log.read_text()
        for log in (run / "logs").glob("rank*.log")
    }
    found = {rank: re.findall(rf"rank {rank}, process (\d+)", text) for rank, text in logs.items()}
    return {rank: int(numbers[-1]) for rank, numbers in found.items() if numbers}


def until(
    condition: Callable[[], Any], seconds: float = 120, said: Callable[[], str] = lambda: ""
) -> None:
    """Wait for the condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, said()
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Is there such a process, and is it more than a dead one's entry?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
