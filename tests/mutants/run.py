"""Put small faults into copies of the product, one at a time, and see which of them the tests find: `make mutants`.

A fault is `<room>/<name>.patch`: what a user would see, then a unified diff. Each is tried with the test that found it
last time (`found.tsv`), and if that one passes, with all quick tests that its room names below, until one fails.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
KNOWN = HERE / "found.tsv"
NEEDED = ("dtrain", "configs", "tests", "scripts", "hydra_plugins", "launch", "docs", "docker", "examples", "pyproject.toml",
          "README.md", "CONTRIBUTING.md", "Makefile", "constraints.txt")  # fmt: skip
# The tests that see a room's faults, those that are quick first.
ROOMS = {
    "loop": "plain_loop loop_promises measure plan refusals model exact experts",
    "strategy": "plan figures refusals context local_sgd exact experts cost instruments capabilities",
    "engine": "deepspeed accelerate",
    "server": "parameter_server",
    "model": "model moe hf plain_loop loop_promises tasks",
    "data": "data preparation tasks plain_loop loop_promises",
    "task": "plain_loop loop_promises tasks data",
    "checkpoint": "durability checkpoint distributed/manifests cli loop_promises",
    "launch": "durability cli instruments distributed/faults",
    "cost": "figures measure instruments cost compare",
    "report": "figures compare cli measure",
    "config": "configs refusals cli capabilities docs",
}
FOUND, MISSED, BROKEN = "found", "NOT FOUND", "broken"
LIMIT_S = 900


@dataclass(frozen=True)
class Outcome:
    """What became of one fault; `by` is the test that found it, or why it could not be tried."""

    name: str
    result: str
    by: str
    seconds: float


def tests_of(room: str) -> list[str]:
    return [
        str(Path("tests") / word).replace(Path(word).name, f"test_{Path(word).name}.py") for word in ROOMS[room].split()
    ]


def attempt(patch: Path, known: str) -> Outcome:
    """Try one fault in a copy of the tree."""
    name, begun = f"{patch.parent.name}/{patch.stem}", time.monotonic()

    def outcome(result: str, by: str) -> Outcome:
        return Outcome(name, result, by, time.monotonic() - begun)

    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        for each in NEEDED:
            source = ROOT / each
            ignored = shutil.ignore_patterns("__pycache__", "*.png")
            (shutil.copytree if source.is_dir() else shutil.copy)(
                source, Path(folder) / each, **({"ignore": ignored} if source.is_dir() else {})
            )  # type: ignore[operator]
        applied = subprocess.run(["git", "apply", str(patch)], cwd=folder, capture_output=True, text=True)
        if applied.returncode:
            return outcome(BROKEN, f"does not apply: {applied.stderr.strip().splitlines()[-1]}")
        for tests in [[known]] * bool(known) + [
            [file for file in tests_of(patch.parent.name) if (ROOT / file).exists()]
        ]:
            status, said = pytest(tests, folder)
            if status == 1 and (failed := re.search(r"^(?:FAILED|ERROR) (\S+\.py(?:::.*?)?)(?: - .*)?$", said, re.M)):
                return outcome(FOUND, failed[1])
            if status not in (0, 4, 5):  # 4 and 5: the test that found it is not there any more
                return outcome(BROKEN, said.strip().splitlines()[-1])
    return outcome(MISSED, "")


def pytest(tests: list[str], folder: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--timeout", "120", *tests]
    environment = os.environ | {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return 3, f"no end in {LIMIT_S} s"
    return ran.returncode, ran.stdout + ran.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only faults whose room/name has one of these words")
    parser.add_argument("--workers", type=int, default=3)
    asked = parser.parse_args()
    patches = [p for p in sorted(HERE.glob("*/*.patch"))
               if not asked.names or any(word in f"{p.parent.name}/{p.stem}" for word in asked.names)]  # fmt: skip
    known = dict(line.split("\t") for line in KNOWN.read_text().splitlines()) if KNOWN.exists() else {}
    begun, outcomes = time.monotonic(), []
    with ThreadPoolExecutor(asked.workers) as pool:
        for each in pool.map(lambda p: attempt(p, known.get(f"{p.parent.name}/{p.stem}", "")), patches):
            outcomes.append(each)
            print(f"{each.result:9} {each.seconds:4.0f} s  {each.name:60} {each.by}", flush=True)
            if each.result == FOUND:
                known[each.name] = each.by
                KNOWN.write_text("".join(f"{name}\t{test}\n" for name, test in sorted(known.items())))
    count = {result: sum(each.result == result for each in outcomes) for result in (FOUND, MISSED, BROKEN)}
    print(f"{count[FOUND]} of {len(outcomes)} found, {count[MISSED]} not found, {count[BROKEN]} broken, "
          f"{time.monotonic() - begun:.0f} s")  # fmt: skip
    return int(count[FOUND] < len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
