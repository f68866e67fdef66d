"""Thirteen faults in thirteen runs (`make chaos` tries 200): each is survived, or refused with
a word, and leaves nothing.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos import COMPLETED, STOPPED, drawn, one
from hosts import NotHere


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chaos")


@pytest.mark.deep
@pytest.mark.parametrize(("kind", "seed"), drawn(13, 7))
def test_a_fault_costs_minutes_and_not_the_run(kind: str, seed: int, folder: Path) -> None:
    try:
        outcome, _ = one(kind, seed, folder, folder / "cache")
    except NotHere as reason:
        pytest.skip(str(reason))
    assert outcome in (COMPLETED, STOPPED)
