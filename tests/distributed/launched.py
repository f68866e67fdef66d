"""What runs that a cluster's launchers start are asked for, and where."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from runs import ROOT

TINY = ["model=tiny", "global_batch_size=4", "eval.every=0", "launch.threads=1", "strategy=ddp"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
               "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
