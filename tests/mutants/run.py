"""Put small faults into copies of the product, one at a time, and see which of them the tests find:
`make mutants`.

A fault is `<room>/<name>.patch`: what a user would see, then a unified diff. Each is tried with the
test that found it last time (`found.tsv`), and if that one passes, with all quick tests that its
room names below, until one fails.
"""

from __future__ import annotations

import argparse
import atexit
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
KNOWN = HERE / "found.tsv"
NEEDED = (
    "dtrain",
    "configs",
    "tests",
    "scripts",
    "hydra_plugins",
    "launch",
    "docs",
    "docker",
    "examples",
    "pyproject.toml",
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "Makefile",
    "constraints.txt",
)
# The tests that see a room's faults, those that are quick first.
ROOMS = {
    "loop": (
        "plain_loop loop_promises presence stepping precision plan refusals measure own_model "
        "model exact experts cost"
    ),
    "strategy": (
        "plan pipeline precision figures refusals presence own_model plain_loop local_sgd context "
        "experts exact cost instruments"
    ),
    "engine": "presence_engines deepspeed accelerate",
    "server": "server at_once listening parameter_server",
    "model": "model moe own_model images loop_promises plain_loop hf tasks",
    "data": "data files tokenizers kept preparation images loop_promises tasks",
    "task": "plain_loop loop_promises preparation images tasks data",
    "checkpoint": (
        "durability agree folder checkpoint stepping presence distributed/manifests cli "
        "loop_promises"
    ),
    "launch": (
        "launch front_door agree folder listening started watch ending durability refusals instruments cli "
        "distributed/docker distributed/faults"
    ),
    "cost": "figures front_door measure instruments cost compare",
    "report": (
        "figures reports records images messages at_once measure report_page compare instruments data cli"
    ),
    "config": "messages configs refusals data cli capabilities docs",
}
# What each copy would have to import anew, of others.
LIBRARIES = (
    "torch",
    "torch.distributed.run",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "torch._dynamo",
    "hydra",
    "numpy",
    "sklearn.metrics",
    "scipy.linalg",
    "PIL.Image",
    "matplotlib",
    "plotly",
    "safetensors.torch",
    "tokenizers",
    "torch.distributed.checkpoint",
    "torch.distributed.pipelining",
)
FOUND, MISSED, BROKEN = "found", "NOT FOUND", "broken"
LIMIT_S = 900


@dataclass(frozen=True)
class Outcome:
    """What became of one fault; `by` is the test that found it, or why it could not be tried."""

    result: str
    seconds: str
    name: str
    by: str

    @classmethod
    def read(cls, file: Path, name: str) -> Outcome:
        if not file.exists():
            return cls(BROKEN, str(LIMIT_S), name, "no end in time")
        return cls(*file.read_text().split("\t"))


def tests_of(room: str) -> list[str]:
    return [
        str(Path("tests") / word).replace(Path(word).name, f"test_{Path(word).name}.py")
        for word in ROOMS[room].split()
    ]


def copied(folder: Path) -> None:
    """The tree, as far as tests need it."""
    for each in NEEDED:
        source = ROOT / each
        if source.is_dir():
            shutil.copytree(source, folder / each, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / each)


def attempt(patch: Path, known: str, folder: Path) -> None:
    """What a child does with one fault in a copy of the tree; it leaves its outcome in a file
    there.
    """
    name, begun = f"{patch.parent.name}/{patch.stem}", time.monotonic()

    def outcome(result: str, by: str) -> None:
        (folder / "outcome").write_text(f"{result}\t{time.monotonic() - begun:.0f}\t{name}\t{by}")

    copied(folder)
    applied = subprocess.run(
        ["git", "apply", str(patch)], cwd=folder, capture_output=True, text=True
    )
    if applied.returncode:
        return outcome(BROKEN, f"does not apply: {applied.stderr.strip().splitlines()[-1]}")
    files = [file for file in tests_of(patch.parent.name) if (ROOT / file).exists()]
    for number, tests in enumerate([[known], files] if known else [files]):
        status, said = forked(lambda: pytest_in(folder, tests), folder / f"said-{number}")  # noqa: B023
        failed = re.search(r"^(?:FAILED|ERROR) (\S+\.py(?:::.*?)?)(?: - .*)?$", said, re.M)
        if status == 1 and failed:
            sure = tests == [known] and "Failed: Timeout" not in said
            if not sure and not _passes_without(patch, failed[1], folder):
                return outcome(BROKEN, f"fails without the fault too: {failed[1]}")
            return outcome(FOUND, failed[1])
        if status not in (0, 4, 5):  # 4 and 5: the test that found it is not there any more
            return outcome(BROKEN, f"status {status}: {' '.join(said.strip().splitlines()[-1:])}")
    outcome(MISSED, "")


def _passes_without(patch: Path, test: str, folder: Path) -> bool:
    """Does a test that has failed pass in the same place once the fault is taken out?"""
    subprocess.run(["git", "apply", "--reverse", str(patch)], cwd=folder, check=True)
    return forked(lambda: pytest_in(folder, [test]), folder / "said-without")[0] == 0


def pytest_in(folder: Path, tests: list[str]) -> int:
    os.chdir(folder)
    sys.path[:0] = [str(folder), str(folder / "tests")]
    sys.dont_write_bytecode = True
    nursery = tempfile.mkdtemp(dir=folder) + "/nursery"
    os.environ |= {"PYTHONPATH": str(folder), "DTRAIN_NURSERY": nursery, "OMP_NUM_THREADS": "1"}
    alive_r, alive_w = os.pipe()
    if not os.fork():
        os.dup2(alive_r, 0)
        os.close(alive_w)
        importlib.import_module("warm").main(nursery)
    return int(
        pytest.main(
            [
                "-x",
                "-q",
                "-W",
                "ignore::pytest.PytestAssertRewriteWarning",
                "-p",
                "no:cacheprovider",
                "--timeout",
                "120",
                *tests,
            ]
        )
    )


def forked(function: Callable[[], int], output: Path) -> tuple[int, str]:
    """The status of what a fork of this process does, which has imported the libraries, and
    what it prints.
    """
    if not (pid := os.fork()):
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        atexit._clear()  # what this process would clean up
        status = 3
        try:
            status = function()
            sys.stdout.flush()
            atexit._run_exitfuncs()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), output.read_text(errors="replace")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", help="only faults whose room/name has one of these words"
    )
    parser.add_argument("--workers", type=int, default=3)
    asked = parser.parse_args()
    patches = [
        p
        for p in sorted(HERE.glob("*/*.patch"))
        if not asked.names or any(word in f"{p.parent.name}/{p.stem}" for word in asked.names)
    ]
    known = (
        dict(line.split("\t") for line in KNOWN.read_text().splitlines()) if KNOWN.exists() else {}
    )
    for library in LIBRARIES:
        importlib.import_module(library)
    begun, outcomes, at_work = time.monotonic(), [], {}
    place = tempfile.mkdtemp(prefix="mutants-")
    try:
        waiting = list(enumerate(patches))
        while waiting or at_work:
            while waiting and len(at_work) < asked.workers:
                number, patch = waiting.pop(0)
                folder = Path(place) / str(number)
                folder.mkdir()
                if not (pid := os.fork()):
                    os.setsid()
                    signal.alarm(LIMIT_S)
                    try:
                        attempt(patch, known.get(f"{patch.parent.name}/{patch.stem}", ""), folder)
                    finally:
                        os._exit(0)
                at_work[pid] = folder, patch
            pid, _ = os.wait()
            folder, patch = at_work.pop(pid)
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            each = Outcome.read(folder / "outcome", f"{patch.parent.name}/{patch.stem}")
            shutil.rmtree(folder, ignore_errors=True)
            outcomes.append(each)
            print(f"{each.result:9} {each.seconds:4} s  {each.name:60} {each.by}", flush=True)
            if each.result == FOUND:
                known[each.name] = each.by
                KNOWN.write_text(
                    "".join(f"{name}\t{test}\n" for name, test in sorted(known.items()))
                )
    finally:
        shutil.rmtree(place, ignore_errors=True)
    count = {
        result: sum(each.result == result for each in outcomes)
        for result in (FOUND, MISSED, BROKEN)
    }
    print(
        f"{count[FOUND]} of {len(outcomes)} found, {count[MISSED]} not found, {count[BROKEN]} "
        f"broken, "
        f"{time.monotonic() - begun:.0f} s"
    )
    return int(count[FOUND] < len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
