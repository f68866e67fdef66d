"""What launch/ and its page give to scripts/train.py composes."""

from __future__ import annotations

import re
import shlex

import pytest
from hydra import compose, initialize_config_dir
from runs import ROOT

from dtrain.config.schema import register

TEXTS = [ROOT / "docs" / "clusters.md", *(ROOT / "launch").rglob("*.*")]
LINES = [
    line
    for text in TEXTS
    for line in re.findall(
        r"(?:launch/slurm\.sbatch|scripts/train\.py) ((?:\S+=|-- ).*)", text.read_text()
    )
    if "$" not in line and "," not in line  # shell's words; a sweep
]


@pytest.mark.parametrize("line", LINES)
def test_overrides_compose(line: str) -> None:
    register()
    common, *tasks = line.split(" -- ")
    for task in shlex.split(tasks[0]) if tasks else [""]:
        overrides = [
            word for word in shlex.split(common) + task.split() if not word.startswith("hydra.")
        ]
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            assert compose("train", overrides=overrides).steps >= 1
