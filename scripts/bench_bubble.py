"""The pipeline's bubble, measured beside its theory: two stages, a core each, a model of large
products.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

SCHEDULES, REPEATS = ("1f1b", "gpipe", "interleaved_1f1b", "zbv"), 3
SETTINGS = (
    "strategy=pipeline",
    "launch.nproc=2",
    "profile=true",
    "steps=4",
    "eval.every=0",
    "model.d_model=2048",
    "model.n_layers=4",
    "global_batch_size=4",
    "strategy.pp.micro_batches=4",
)


def measure(schedule: str) -> dict[str, float]:
    """A run's bubble: measured and in theory."""
    with tempfile.TemporaryDirectory() as folder:
        own = (f"strategy.pp.schedule={schedule}", f"hydra.run.dir={folder}")
        subprocess.run(
            [sys.executable, "scripts/train.py", *SETTINGS, *own],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return json.loads((Path(folder) / "summary.json").read_text())["profile"]["bubble"]


rounds = [{schedule: measure(schedule) for schedule in SCHEDULES} for _ in range(REPEATS)]
for schedule in SCHEDULES:
    seen = [each[schedule]["measured"] for each in rounds]
    theory = rounds[0][schedule]["theory"]
    print(
        f"{schedule:18} {median(seen):6.1%} measured ({min(seen):.1%} to {max(seen):.1%})  "
        f"{theory:6.1%} in theory"
    )
