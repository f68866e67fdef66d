"""The faults that `make mutants` puts in fit the code as it is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATCHES = sorted((ROOT / "tests" / "mutants").glob("*/*.patch"))


@pytest.mark.parametrize("room", sorted({patch.parent.name for patch in PATCHES}))
def test_each_fault_can_be_put_in(room: str) -> None:
    own = [patch for patch in PATCHES if patch.parent.name == room]
    assert len(own) >= 2
    for patch in own:
        said = subprocess.run(
            ["git", "apply", "--check", str(patch)], cwd=ROOT, capture_output=True, text=True
        )
        assert said.returncode == 0, f"{patch.stem}: {said.stderr}"
        assert patch.read_text().split("\n")[0].endswith("."), (
            f"{patch.stem} does not say what a user would see"
        )
