"""Hydra's submitit launcher, by its executor for this machine. tests/distributed/test_slurm.py
has Slurm's.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from runs import ENVIRONMENT, ROOT, TINY, curve

pytest.importorskip(
    "hydra_plugins.hydra_submitit_launcher", reason="pip install hydra-submitit-launcher"
)


@pytest.mark.deep
def test_each_job_of_a_sweep_starts_its_ranks(tmp_path: Path) -> None:
    command = [
        "python",
        "scripts/train.py",
        "--multirun",
        "hydra/launcher=submitit_local",
        "launch.nproc=2",
        f"hydra.sweep.dir={tmp_path}",
        *TINY,
        "steps=3",
        "seed=1,2",
    ]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True)
    assert [len(curve(tmp_path / number)) for number in "01"] == [3, 3]
