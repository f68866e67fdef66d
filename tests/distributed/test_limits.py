"""A memory limit that lets the kernel kill a rank, and one on processes: by a control group of
this test's own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from runs import printed, start, training, until

GROUPS = Path("/sys/fs/cgroup")
HUNGRY = """
import os
from dtrain.task.causal_lm import CausalLM
kept = []
class Hungry(CausalLM):
    def batch(self, step):
        while step > 1 and os.environ["RANK"] == "1":
            kept.append(bytearray(b"x" * (1 << 24)))
        return super().batch(step)
"""


@pytest.fixture
def within() -> Iterator[Callable[[str, str, str], tuple[str, ...]]]:
    """Words that put what follows into a group of its own with a limit: of a controller, by its
    older and newer file.
    """
    made: list[Path] = []

    def of(controller: str, file: str, value: str) -> tuple[str, ...]:
        newer = (GROUPS / "cgroup.controllers").exists()
        group = GROUPS / ("" if newer else controller) / f"dtrain-test-{os.getpid()}"
        try:
            group.mkdir()
            made.append(group)
            (group / (file.replace("limit_in_bytes", "max") if newer else file)).write_text(value)
        except OSError as error:
            pytest.skip(f"no control group can be made here: {error}")
        return "sh", "-c", f'echo $$ >{group}/cgroup.procs && exec "$@"', "sh"

    yield of
    for group in made:
        until(lambda group=group: _removed(group), 30)  # by then no process of the run is left


def _removed(group: Path) -> bool:
    with suppress(OSError):  # busy
        group.rmdir()
    return not group.exists()


def run(folder: Path, before: tuple[str, ...], *settings: str) -> int:
    command = [
        sys.executable,
        *training("launch.nproc=2", "strategy=ddp", "steps=4", "hydra.run.dir=run", *settings),
    ]
    process = start(folder, *command, before=before, PYTHONPATH=str(folder))
    return process.wait(300)


@pytest.mark.deep
def test_a_rank_that_is_killed_for_want_of_memory_is_told_so(
    tmp_path: Path, within, cache: Path
) -> None:
    (tmp_path / "hungry.py").write_text(HUNGRY)
    status = run(
        tmp_path, within("memory", "memory.limit_in_bytes", "2000M"), "task._target_=hungry.Hungry"
    )
    said = printed(tmp_path).splitlines()[-1]
    assert status == 1 and said.startswith(
        "dtrain: rank 1 ended with signal 9: the kernel has ended a process for want of"
    )


@pytest.mark.deep
@pytest.mark.parametrize("processes", [5, 12, 17, 24])
def test_too_few_processes_are_said(processes: int, tmp_path: Path, within, cache: Path) -> None:
    """Before ranks are started: gloo would abort one, or wait for ever."""
    status = run(tmp_path, within("pids", "pids.max", str(processes)))
    said = printed(tmp_path).splitlines()[-1]
    assert status == 2 and said.startswith("dtrain: the system allows no more processes or threads")


@pytest.mark.deep
@pytest.mark.parametrize(("files", "ended"), [(64, {0}), (24, {1, 2})])
def test_few_open_files_are_enough_or_said(
    files: int, ended: set[int], tmp_path: Path, cache: Path
) -> None:
    status = run(tmp_path, ("sh", "-c", f'ulimit -n {files} && exec "$@"', "sh"))
    said = printed(tmp_path).splitlines()[-1]
    assert status in ended and said.startswith("weights: " if 0 in ended else "dtrain: "), said
